"""Packed and grouped matrix products: one public function each, a backend per file."""
