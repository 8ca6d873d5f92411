"""Run folders: writes the records of a run, reads finished runs for later runs, and exports runs to COCO and YOLO.

Does not belong here: training and prediction.
"""
