"""From records and profiles to tables, figures and pages. Loads no model."""
