"""The torchx components, installed as `shardemb.launch`. Holds no training code, needs no torch."""
