"""What was used, by whom: one record for each finished request.

- `record`    the record itself, made once from the Exchange (the log line is its JSON), and the newest ones
- `prices`    what an answer costs; pure
- `frames`    how a journal looks on disk
- `marks`     what a journal holds of requests that have not ended
- `journal`   the local account of this process's requests, which survives its end
- `recovery`  reading journals, and ending those whose process is gone
- `totals`    sums over records; pure
- `tally`     sums of what was journalled since it was last shipped
- `shipper`   from the journals into the store, each record exactly once
- `folded`    sums of what is no longer kept record by record, without a store
- `report`    reading: sums over a window
- `story`     reading: one request, from its principal to its cost
- `reconcile` the ledger against the engines' own counters
- `cli`       the commands `usage`, `explain` and `reconcile`

May import store, wire, exchange and errors.
"""
