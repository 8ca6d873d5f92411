"""Fuses SIIM's tables of predictions, given one by one."""

from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.fusion import model_fusion
from kitlib.fusion.model_fusion import ModelPredictions
from kitlib.fusion.tuning import Judge


def fuse(study_scores, image_scores, detections, images, settings, coverage=None):
    tables = {"study_scores": study_scores, "image_scores": image_scores, "detections": detections, "coverage": coverage}
    return model_fusion.fuse(ModelPredictions.of(**tables), images, settings)


def fuse_boxes(detections, images, settings, coverage=None):
    return model_fusion.merge(ModelPredictions.of(detections=detections, coverage=coverage), images, settings).detections()


def siim_judge(study_scores, image_scores, detections, coverage, images, labels, boxes, folds):
    predicted = {"study_scores": study_scores, "image_scores": image_scores, "detections": detections, "coverage": coverage}
    tables = {"images": images, "labels": labels, "boxes": boxes, "folds": folds}
    return Judge(SIIM_COVID19, ModelPredictions.of(**predicted), tables)
