package index

import (
	"math/bits"
	"slices"

	"firn.io/firn/internal/block"
)

// chunkTable maps the chunks that have a record to their versions, in about
// ten bytes each: a group holds every W-th chunk of a volume, so a page of 1024
// chunk numbers has a bitmap of those that are there and their versions packed.
type chunkTable struct {
	pages map[uint32]*chunkPage
	order []uint32 // numbers of the pages, ascending
	count int
}

const pageChunks = 1024

type chunkPage struct {
	present [pageChunks / 64]uint64
	// extras marks records that hold more than a version; nil when none does.
	extras   *[pageChunks / 64]uint64
	versions []block.Version
}

func (p *chunkPage) rank(i uint32) int {
	n := bits.OnesCount64(p.present[i/64] & (1<<(i%64) - 1))
	for _, w := range p.present[:i/64] {
		n += bits.OnesCount64(w)
	}
	return n
}

func (p *chunkPage) has(i uint32) bool { return p.present[i/64]&(1<<(i%64)) != 0 }

func (t *chunkTable) get(c block.Chunk) (block.Version, bool) {
	p := t.pages[uint32(c)/pageChunks]
	i := uint32(c) % pageChunks
	if p == nil || !p.has(i) {
		return 0, false
	}
	return p.versions[p.rank(i)], true
}

func (t *chunkTable) set(c block.Chunk, v block.Version) {
	n, i := uint32(c)/pageChunks, uint32(c)%pageChunks
	p := t.pages[n]
	if p == nil {
		if t.pages == nil {
			t.pages = make(map[uint32]*chunkPage)
		}
		p = &chunkPage{}
		t.pages[n] = p
		at, _ := slices.BinarySearch(t.order, n)
		t.order = slices.Insert(t.order, at, n)
	}
	r := p.rank(i)
	if p.has(i) {
		p.versions[r] = v
		return
	}
	p.present[i/64] |= 1 << (i % 64)
	p.versions = slices.Insert(p.versions, r, v)
	t.count++
}

func (t *chunkTable) remove(c block.Chunk) {
	n, i := uint32(c)/pageChunks, uint32(c)%pageChunks
	p := t.pages[n]
	if p == nil || !p.has(i) {
		return
	}
	r := p.rank(i)
	p.versions = slices.Delete(p.versions, r, r+1)
	p.present[i/64] &^= 1 << (i % 64)
	if p.extras != nil {
		p.extras[i/64] &^= 1 << (i % 64)
	}
	t.count--
	if len(p.versions) == 0 {
		delete(t.pages, n)
		at, _ := slices.BinarySearch(t.order, n)
		t.order = slices.Delete(t.order, at, at+1)
	}
}

// markExtras notes that the record of c, which is there, holds more than its version.
func (t *chunkTable) markExtras(c block.Chunk) {
	p, i := t.pages[uint32(c)/pageChunks], uint32(c)%pageChunks
	if p.extras == nil {
		p.extras = new([pageChunks / 64]uint64)
	}
	p.extras[i/64] |= 1 << (i % 64)
}

func (t *chunkTable) hasExtras(c block.Chunk) bool {
	p, i := t.pages[uint32(c)/pageChunks], uint32(c)%pageChunks
	return p != nil && p.extras != nil && p.extras[i/64]&(1<<(i%64)) != 0
}

// next returns the first chunk at or after c that has a record.
func (t *chunkTable) next(c block.Chunk) (block.Chunk, bool) {
	n, i := uint32(c)/pageChunks, uint32(c)%pageChunks
	at, found := slices.BinarySearch(t.order, n)
	if found {
		p := t.pages[n]
		w := p.present[i/64] &^ (1<<(i%64) - 1)
		for j := i / 64; ; {
			if w != 0 {
				return block.Chunk(n*pageChunks + j*64 + uint32(bits.TrailingZeros64(w))), true
			}
			if j++; j == pageChunks/64 {
				break
			}
			w = p.present[j]
		}
		at++
	}
	if at == len(t.order) {
		return 0, false
	}
	n = t.order[at]
	for j, w := range t.pages[n].present {
		if w != 0 {
			return block.Chunk(n*pageChunks + uint32(j)*64 + uint32(bits.TrailingZeros64(w))), true
		}
	}
	return 0, false
}
