"""Run folders: what they record, what later stages read from them, export to COCO and YOLO.

Nothing that trains or predicts.
"""
