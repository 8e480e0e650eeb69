"""One file per noun: parse, call one function, render."""
