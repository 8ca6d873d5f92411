"""The web page: one study's images, what the models say of them and where they look.

Nothing that a submission needs.
"""
