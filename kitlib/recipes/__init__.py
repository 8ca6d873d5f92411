"""Training recipes: the fields of each kind of training with defaults and valid values, and the published recipes by name.

Code that trains is in kitlib.training, code that predicts in kitlib.inference.
"""
