package index

import (
	"math/bits"

	"firn.io/firn/internal/block"
)

// layer says where a candidate comes from; the lower one wins ties.
type layer uint8

const (
	layerDelta layer = iota
	layerFrozen
	layerStore
	layerMarker
)

// candidate is an extent, or a range marker, over blocks of one cell.
type candidate struct {
	gen     block.Generation
	written block.Version
	layer   layer
	from    uint8  // first block, relative to the cell
	count   uint8  // blocks
	src     int    // which one of its layer
	cover   uint16 // its blocks, relative to the cell; of extents in memory those that are live
	live    uint16 // those that some view sees, relative to the cell
	plain   uint16 // the same, if there were no markers
	tied    bool   // a newer layer has the same (generation, written) over some of it
}

// cell decides what is live of one 64 KiB cell of a chunk.
type cell struct {
	cands   []candidate
	markers int
}

func (c *cell) reset() { c.cands, c.markers = c.cands[:0], 0 }

func (c *cell) add(k candidate) {
	if k.cover == 0 {
		k.cover = (1<<k.count - 1) << k.from
	}
	if k.layer == layerMarker {
		c.markers++
	}
	// They come nearly sorted and are few: insertion keeps the newest first.
	i := len(c.cands)
	c.cands = append(c.cands, k)
	for ; i > 0 && newer(&k, &c.cands[i-1]); i-- {
		c.cands[i] = c.cands[i-1]
	}
	c.cands[i] = k
}

// addExtent adds an extent of a delta. Its dead blocks are left out: a newer
// extent of the same delta has them, or the same bytes moved once more.
func (c *cell) addExtent(e *extent, l layer, base uint16, src int) {
	from := uint8(e.block - base)
	c.add(candidate{gen: e.gen, written: e.written, layer: l, from: from, count: e.count, cover: e.live << from, src: src})
}

func (c *cell) addMarkers(m *markers, chunk block.Chunk) {
	for i := range m.layers {
		if s, ok := m.layers[i].at(chunk); ok {
			c.add(candidate{gen: m.layers[i].gen, written: s.written, layer: layerMarker, count: cellBlocks})
		}
	}
}

func newer(a, b *candidate) bool {
	switch {
	case a.gen != b.gen:
		return a.gen > b.gen
	case a.written != b.written:
		return a.written > b.written
	}
	return a.layer < b.layer
}

// resolve sets live and plain of all candidates: a block of one is live when
// nothing newer covers it, or when a retained view lies between.
func (c *cell) resolve(keep *retention) {
	c.pass(keep, true)
	if c.markers > 0 {
		c.pass(keep, false)
		return
	}
	for i := range c.cands {
		c.cands[i].plain = c.cands[i].live
	}
}

func (c *cell) pass(keep *retention, withMarkers bool) {
	var above [cellBlocks]block.Generation // of the closest newer candidate
	var covered uint16
	for i := range c.cands {
		k := &c.cands[i]
		if k.layer == layerMarker && !withMarkers {
			continue
		}
		live := k.cover &^ covered
		if len(keep.list) > 0 || keep.from < block.GenerationLatest {
			for m := k.cover & covered; m != 0; m &= m - 1 {
				b := bits.TrailingZeros16(m)
				if keep.needs(k.gen, above[b]) {
					live |= 1 << b
				}
			}
		}
		if withMarkers {
			k.live = live
			k.tied = i > 0 && c.ties(i)
		} else {
			k.plain = live
		}
		for m := k.cover; m != 0; m &= m - 1 {
			above[bits.TrailingZeros16(m)] = k.gen
		}
		covered |= k.cover
	}
}

// ties tells whether a candidate before i names the same bytes for some block.
func (c *cell) ties(i int) bool {
	k := &c.cands[i]
	for j := i - 1; j >= 0 && c.cands[j].gen == k.gen && c.cands[j].written == k.written; j-- {
		if c.cands[j].cover&k.cover != 0 && c.cands[j].layer != layerMarker {
			return true
		}
	}
	return false
}

// runs calls f for each run of set bits.
func runs(mask uint16, f func(from, count uint8)) {
	for mask != 0 {
		from := bits.TrailingZeros16(mask)
		n := bits.TrailingZeros16(^(mask >> from))
		f(uint8(from), uint8(n))
		mask &^= (1<<n - 1) << from
	}
}
