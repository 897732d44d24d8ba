"""What mandapa tests itself with, for those who write an object store or want to see mandapa under faults.

`conformance` is the suite that every object store has to pass (needs pytest); `faults` has object stores that lose
requests, crash and count; `server` is an S3 and GCS server in memory; `services` starts other people's servers.
"""
