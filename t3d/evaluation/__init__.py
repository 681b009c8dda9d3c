"""Stage 4: scores, results, reports, analysis."""
