"""The web page, which shows the images of one study, the models' predictions, and where the models look.

Does not belong here: anything that a submission needs.
"""
