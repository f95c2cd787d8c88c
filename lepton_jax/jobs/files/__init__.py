"""Files of any size, here or in a bucket: rows come out of them one by one and go back in whole.

`places.py` opens paths, `source.py` reads rows of all formats (`tables.py` those with columns),
`journal.py` keeps what is done so that a killed job can go on, `writers.py` gives the finished file
its form, `lock.py` keeps a second process away. What a row means is not known here: `jobs/rows.py`.
"""
