"""What was used, by whom: one record for each finished request.

- `record`  the record itself, made once from the Exchange (the log line is its JSON), and the newest ones

May import exchange and errors. Records are kept in memory only: a restart forgets them.
"""
