package index

import (
	"math/bits"
	"slices"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// volumeDelta is what was applied to a volume since the last freeze.
type volumeDelta struct {
	chunks map[block.Chunk]*chunkDelta
	blocks int64 // live local blocks in it
}

// chunkDelta holds a chunk's new extents in the order of their first blocks.
type chunkDelta struct {
	// version is of the last change of content; 0 if there were only moves.
	version block.Version
	// extras: the stored record holds more than its version.
	extras  bool
	extents []extent
	crcs    []uint32 // of extents of several blocks
	waste   int      // entries of crcs that no extent uses
}

// extent is one extent in memory: 32 bytes, without pointers.
type extent struct {
	written block.Version
	gen     block.Generation
	segment seglog.SegmentID
	crc     uint32 // of a single block; else where its CRCs begin in crcs
	block   uint16 // the first one, within the chunk
	at      uint16 // where the bytes begin, in blocks of the segment
	live    uint16 // bit i: a view may see block i of it, as far as the delta tells
	count   uint8
	flags   uint8
}

const (
	extentZero  = 1 << 0
	extentMoved = 1 << 1 // by a move: it may be older than what lower layers hold
)

func (e *extent) zero() bool { return e.flags&extentZero != 0 }

// overlap returns the blocks of e that [first, first+count) covers, relative to e.
func overlap(e *extent, first uint16, count uint8) uint16 {
	lo := max(e.block, first)
	hi := min(e.block+uint16(e.count), first+uint16(count))
	if lo >= hi {
		return 0
	}
	return (1<<(hi-lo) - 1) << (lo - e.block)
}

func (c *chunkDelta) crcsOf(e *extent) []uint32 {
	switch {
	case e.zero():
		return nil
	case e.count == 1:
		return []uint32{e.crc}
	}
	return c.crcs[e.crc : e.crc+uint32(e.count)]
}

func (c *chunkDelta) crcAt(e *extent, i uint16) uint32 {
	if e.count == 1 {
		return e.crc
	}
	return c.crcs[e.crc+uint32(i)]
}

// cell returns the extents of one 64 KiB cell.
func (c *chunkDelta) cell(base uint16) []extent {
	lo := c.search(base)
	hi := lo
	for hi < len(c.extents) && c.extents[hi].block < base+cellBlocks {
		hi++
	}
	return c.extents[lo:hi]
}

// search returns the first extent that begins at b or later.
func (c *chunkDelta) search(b uint16) int {
	lo, hi := 0, len(c.extents)
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		if c.extents[m].block < b {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

// insert adds e, unless newer extents of the delta hide all of it, and removes
// what it hides. dead is called for blocks of local extents that no view can
// see any more, with bits relative to the extent; they leave the delta. e.live
// has its blocks that may be seen; insert clears those that are hidden already.
// It returns e.live as it is then; 0 if e was not added.
func (c *chunkDelta) insert(e extent, crcs []uint32, keep *retention, dead func(*extent, uint16)) uint16 {
	base := e.block &^ (cellBlocks - 1)
	lo := c.search(base)
	end := lo
	put := lo // where the next one that stays goes
	pos := lo // where e goes
	for ; end < len(c.extents) && c.extents[end].block < base+cellBlocks; end++ {
		x := &c.extents[end]
		if over := overlap(x, e.block, e.count); over != 0 {
			if x.gen > e.gen || x.gen == e.gen && x.written > e.written {
				if !keep.needs(e.gen, x.gen) {
					e.live &^= overlap(&e, x.block, x.count)
				}
			} else if hit := over & x.live; hit != 0 && !keep.needs(x.gen, e.gen) {
				x.live &^= hit
				if !x.zero() {
					dead(x, hit)
				}
				if x.live == 0 {
					if x.count > 1 && !x.zero() {
						c.waste += int(x.count)
					}
					continue
				}
			}
		}
		if put != end {
			c.extents[put] = *x
		}
		put++
		if x.block <= e.block {
			pos = put
		}
	}
	if e.live == 0 {
		c.extents = slices.Delete(c.extents, put, end)
		return 0
	}
	c.addCRCs(&e, crcs)
	if put == end {
		c.extents = slices.Insert(c.extents, pos, e)
		return e.live
	}
	copy(c.extents[pos+1:put+1], c.extents[pos:put])
	c.extents[pos] = e
	c.extents = slices.Delete(c.extents, put+1, end)
	return e.live
}

// drop removes the extents for which hidden is true; dead is called as by insert.
func (c *chunkDelta) drop(hidden func(*extent) bool, dead func(*extent, uint16)) {
	c.extents = slices.DeleteFunc(c.extents, func(e extent) bool {
		if !hidden(&e) {
			return false
		}
		if !e.zero() {
			dead(&e, e.live)
			if e.count > 1 {
				c.waste += int(e.count)
			}
		}
		return true
	})
}

func (c *chunkDelta) addCRCs(e *extent, crcs []uint32) {
	switch {
	case e.zero():
	case e.count == 1:
		e.crc = crcs[0]
	default:
		if len(c.crcs)+len(crcs) > cap(c.crcs) && c.waste > len(c.crcs)/2 {
			c.compactCRCs()
		}
		e.crc = uint32(len(c.crcs))
		c.crcs = append(c.crcs, crcs...)
	}
}

// compactCRCs drops the CRCs that no extent uses any more.
func (c *chunkDelta) compactCRCs() {
	packed := make([]uint32, 0, len(c.crcs))
	for i := range c.extents {
		e := &c.extents[i]
		if e.count > 1 && !e.zero() {
			from := uint32(len(packed))
			packed = append(packed, c.crcs[e.crc:e.crc+uint32(e.count)]...)
			e.crc = from
		}
	}
	c.crcs, c.waste = packed, 0
}

// bytes is about the memory of the delta of a chunk.
func (c *chunkDelta) bytes() int64 { return int64(cap(c.extents))*32 + int64(cap(c.crcs))*4 + 128 }

func blocksIn(mask uint16) int64 { return int64(bits.OnesCount16(mask)) }
