"""The composition: locate the models, plan, run the stages, report."""
