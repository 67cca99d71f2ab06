"""nki.language functions that issue instructions: each allocates its result.

Results are SBUF tiles of the input's dtype unless told otherwise; matmul and transpose give PSUM
tiles, as documented. Which instructions the vendor's compiler picks is not documented, so the
log's are our choice.
"""
