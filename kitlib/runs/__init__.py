"""Run folders: what they record, what later stages read from them, and export to COCO and YOLO.

Does not belong here: training and prediction.
"""
