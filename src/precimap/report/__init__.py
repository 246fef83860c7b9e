"""The pages a person reads, on a terminal of any width.

run_record.py   a run directory, read back into values
answer_page.py  the answer in a box, then each layer with its reason
tables.py       the values of a run as tables
audit_text.py   how the screen was checked
proof.py        the certificate in words
deployed_page.py a deployed model, and what it is not for
exported_page.py an export: what runs where, and how near it is to what was certified
linted_page.py  a checkpoint: its layers by kind, and what an engine would misread
end_to_end_table.py, inventory_table.py, plan_table.py, profile_table.py  whole models timed; a model's layers; units for a
                margin; a hardware profile
progress_bar.py progress with an ETA, on stderr
terminal.py     names and texts of others, shown so that they do nothing to the terminal
"""
