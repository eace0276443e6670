"""One source of data a file: what others have made -> samples."""
