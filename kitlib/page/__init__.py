"""The web page: a study's images, the models' predictions for them, and heat maps.

A submission needs nothing from this package.
"""
