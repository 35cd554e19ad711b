"""KIVI's store and attention in Triton."""
