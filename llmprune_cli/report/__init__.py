"""What commands report: results, report card, chart, model card, runtimes."""
