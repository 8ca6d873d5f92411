"""Run folders: what a run records, what later runs read from its folder, and export to COCO and YOLO.

Does not belong here: training and prediction.
"""
