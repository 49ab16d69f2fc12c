"""The models that ship with vdq-export; `vdq-export sample:NAME` loads one of them."""
