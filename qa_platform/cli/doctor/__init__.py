"""`qa-platform doctor`: checks everything that the platform needs, and says how to fix what is wrong.

`examine` runs the parts in parallel; each part is a module. The doctor changes nothing. Findings name addresses and users, never a
password, a token or a key.
"""
