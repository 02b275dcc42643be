"""What ``disttrain doctor`` looks at: one file a subject, each of which returns findings and raises nothing."""
