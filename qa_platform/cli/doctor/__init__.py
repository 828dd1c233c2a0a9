"""`qa-platform doctor`: checks everything that the platform needs, and says how to fix what is wrong.

`examine` runs the parts side by side; each part has a module of its own. Nothing is changed anywhere. Findings say where things are and
as whom they are used, never a password, a token or a key.
"""
