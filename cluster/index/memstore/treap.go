package memstore

import "bytes"

// node is never changed once it is reachable from a root.
type node struct {
	key, value  []byte
	priority    uint64
	left, right *node
}

// priority is FNV-1a of the key, mixed, so that neighbouring keys differ.
func priority(key []byte) uint64 {
	h := uint64(14695981039346656037)
	for _, c := range key {
		h = (h ^ uint64(c)) * 1099511628211
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	return h ^ h>>33
}

// split returns the nodes below key and those at or above it.
func split(n *node, key []byte) (low, high *node) {
	if n == nil {
		return nil, nil
	}
	c := *n
	if bytes.Compare(n.key, key) < 0 {
		c.right, high = split(n.right, key)
		return &c, high
	}
	low, c.left = split(n.left, key)
	return low, &c
}

// join is the inverse of split.
func join(low, high *node) *node {
	switch {
	case low == nil:
		return high
	case high == nil:
		return low
	case low.priority >= high.priority:
		c := *low
		c.right = join(low.right, high)
		return &c
	}
	c := *high
	c.left = join(low, high.left)
	return &c
}

func insert(n, fresh *node) *node {
	if n == nil {
		return fresh
	}
	order := bytes.Compare(fresh.key, n.key)
	if order == 0 {
		c := *n
		c.value = fresh.value
		return &c
	}
	if fresh.priority > n.priority {
		// The key cannot be below n: its node would have this priority.
		fresh.left, fresh.right = split(n, fresh.key)
		return fresh
	}
	c := *n
	if order < 0 {
		c.left = insert(n.left, fresh)
	} else {
		c.right = insert(n.right, fresh)
	}
	return &c
}

func remove(n *node, key []byte) *node {
	if n == nil {
		return nil
	}
	order := bytes.Compare(key, n.key)
	if order == 0 {
		return join(n.left, n.right)
	}
	c := *n
	if order < 0 {
		c.left = remove(n.left, key)
	} else {
		c.right = remove(n.right, key)
	}
	return &c
}

func deleteRange(n *node, from, to []byte) *node {
	if bytes.Compare(from, to) >= 0 {
		return n
	}
	low, rest := split(n, from)
	_, high := split(rest, to)
	return join(low, high)
}
