"""What a block is, by arithmetic: sizes, folded weights, costs."""
