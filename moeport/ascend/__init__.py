"""The environment of an Ascend machine: what is known of it, what is installed and set here, and what does not fit."""
