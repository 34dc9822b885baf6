"""The table of `benchmarks/matched.py`: every method at the same bytes, by everything that counts.

    material       what is measured with: windows of text, haystacks, tasks, all as token ids
    columns        one column of the table, an item at a time, with any method
    footprint      resident memory and time of a method
    make           material from a tokenizer and files
    artifacts      what is measured of matkv: with codes, ranks alone, and without training
    rows           who is measured at which budget
    records        what was measured: JSON lines, a cell each; a run goes on where it stopped
    run            measuring what is not there yet, in this process or in a package's environment
    child          what runs inside such an environment
    sheet          what was measured as numbers: means, differences and their errors
    figures        what a cell shows of a row, and what it is worth
    notes          what is said beside the tables
    table          the Markdown tables
    picture        loss against bytes
    labels         where names of lines stand free

`material`, `columns`, `footprint` and `child` also run in the environments of peers, which have no
matkv.
"""
