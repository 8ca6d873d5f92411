"""A file of kitlib imports only from files before it in this list; the list is the map of the library."""

import ast
from pathlib import Path

KITLIB = Path(__file__).resolve().parent.parent / "kitlib"

FLOORS = {
    "vocabulary": "classes atomic tables geometry settings recipes named_learners named_recipes paths average_precision "
    "box_merging roc_auc exclusive_classes box_calibration overlap",
    "reading": "dicom_header grey codestream decoders stored_values dicom image_file dicom_writing decode_worker cache "
    "lung_box intensity mask_store darwin_json dataset mask_file siim nih rsna jsrt tb_lungs darwin diagnoses "
    "covid_chestxray kermany covidx covidgr ricord bimcv read_dataset pooled_dataset near_duplicates folds coco "
    "yolo_labels phantom_patients phantom phantom_plan phantom_folder phantom_competition phantom_rsna phantom_nih "
    "phantom_lungs phantom_diagnoses",
    "models": "device bundle lungs lung_crop canvas run_record squeezenet starting_weights box_mask classifier "
    "faster_rcnn yolo fitted_batches patches patch_classifier unet resunet fc_densenet segmenter flannel",
    "running": "read_ahead kill_family deadline training_run data_parallel augmentation xray_dataset patch_dataset "
    "segment_lungs lungs_once mask_dataset predict training batch_mixing classifier_training train_study train_findings "
    "train_lungs apply_lungs train_faster_rcnn train_yolo train_detector train_flannel train_folds nested",
    "judging": "submission scoring fusion temperature stacking put_aside ensembles ensemble_bundle runs annotation_files "
    "pseudo_labels tuning reports heidelberg_report detection_report findings_report data_sheet classification_report "
    "ensemble_report classification_bootstrap classification_runs calibration_report reported_counts published_tables "
    "lungs_report figures study_figures findings_figures classification_figures heat_maps lungs_figures",
    "delivering": "validate install_wheels answering submit run_notebook plan plan_graph run_planned run_plan run_listing "
    "prepared_runs leaderboard opened_study file_facts uploads windowing xray_svg gallery systems warm_models answer_files "
    "page_view page_guard page_server page kernel_spec wheels kernel_start kernel push stand_in sandbox rehearse demo "
    "__main__",
}
ORDER = [module for floor in FLOORS.values() for module in floor.split()]


def test_every_file_stands_on_a_floor():
    files = {path.stem for path in KITLIB.glob("*.py")} - {"__init__"}
    assert files == set(ORDER)


def test_files_import_only_from_below():
    upward = []
    for place, module in enumerate(ORDER):
        tree = ast.parse((KITLIB / f"{module}.py").read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] if node.module != "kitlib" else [f"kitlib.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            below = ORDER[:place]
            upward += [(module, name) for name in names if name.startswith("kitlib.") and name.split(".")[1] not in below]
    assert upward == []
