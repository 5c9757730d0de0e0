"""The places where we reach past SGLang's public extension points, one module each.

`README.md` beside this file is the ledger: why each patch exists and when it can go. Installed as
`autellix_sglang.patches`.
"""
