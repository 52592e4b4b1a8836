"""The boards as a static site: a page a board and a page a row, without a network and without a server."""
