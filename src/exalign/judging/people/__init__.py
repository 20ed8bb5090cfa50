"""Judge by people: a blind, balanced study, its web page, its store, and what comes out of it.

`study` plans who judges what, `store` keeps it in a database, `app` shows it (`security` guards it), `server` runs it,
`commands` is `exalign assess`.
"""
