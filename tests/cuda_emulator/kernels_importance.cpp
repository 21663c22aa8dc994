namespace edlm { enum class Size; void run_importance(Size) {} }
