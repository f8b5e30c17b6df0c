"""Records and models as a run reads them."""
