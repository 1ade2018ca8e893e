package index

import (
	"encoding/binary"
	"math/bits"

	"firn.io/firn/cluster/seglog"
)

// bitmap is the live bits of a segment: which of its blocks are pointed at.
type bitmap []uint64

// set sets the bits [at, at+16) that mask has and returns how many were clear.
func (b *bitmap) set(at uint16, mask uint16) int {
	last := (int(at) + bits.Len16(mask) - 1) / 64
	if last >= len(*b) {
		*b = append(*b, make([]uint64, last+1-len(*b))...)
	}
	w, s := int(at)/64, uint(at)%64
	low, high := uint64(mask)<<s, uint64(mask)>>(64-s)
	n := bits.OnesCount64(low &^ (*b)[w])
	(*b)[w] |= low
	if high != 0 {
		n += bits.OnesCount64(high &^ (*b)[w+1])
		(*b)[w+1] |= high
	}
	return n
}

// clear clears the bits of mask and returns how many were set.
func (b bitmap) clear(at uint16, mask uint16) int {
	had := b.get(at, mask)
	w, s := int(at)/64, uint(at)%64
	if w < len(b) {
		b[w] &^= uint64(mask) << s
	}
	if high := uint64(mask) >> (64 - s); high != 0 && w+1 < len(b) {
		b[w+1] &^= high
	}
	return bits.OnesCount16(had)
}

// get returns those of the bits of mask that are set.
func (b bitmap) get(at uint16, mask uint16) uint16 {
	w, s := int(at)/64, uint(at)%64
	var v uint64
	if w < len(b) {
		v = b[w] >> s
	}
	if s > 0 && w+1 < len(b) {
		v |= b[w+1] << (64 - s)
	}
	return uint16(v) & mask
}

func (b bitmap) count() int {
	n := 0
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}

// The saved form of a bitmap: as words, or, when it is shorter, as the numbers
// of the set bits in order, two bytes each.
const (
	liveWords = 1
	liveList  = 2
	// maxLiveWords is a segment of the largest size.
	maxLiveWords = seglog.MaxSegmentBytes / 4096 / 64
)

func appendBitmap(dst []byte, b bitmap) []byte {
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	if n := b.count(); n*2 < len(b)*8 {
		dst = append(dst, liveList)
		for i, w := range b {
			for ; w != 0; w &= w - 1 {
				dst = binary.LittleEndian.AppendUint16(dst, uint16(i*64+bits.TrailingZeros64(w)))
			}
		}
		return dst
	}
	dst = append(dst, liveWords)
	for _, w := range b {
		dst = binary.LittleEndian.AppendUint64(dst, w)
	}
	return dst
}

func decodeBitmap(p []byte) (bitmap, error) {
	switch {
	case len(p) > 1 && p[0] == liveWords && len(p)%8 == 1 && len(p)/8 <= maxLiveWords:
		b := make(bitmap, len(p)/8)
		for i := range b {
			b[i] = binary.LittleEndian.Uint64(p[1+8*i:])
		}
		return b, nil
	case len(p) > 0 && p[0] == liveList && len(p)%2 == 1:
		var b bitmap
		last := -1
		for q := p[1:]; len(q) > 0; q = q[2:] {
			i := int(binary.LittleEndian.Uint16(q))
			if i <= last {
				return nil, corrupt("live bits", p)
			}
			last = i
			b.set(uint16(i), 1)
		}
		return b, nil
	}
	return nil, corrupt("live bits", p)
}

// liveBits are the live bits of a disk: the union over its replicas, whose
// blocks are disjoint (S9). A block that a merge found dead is not live any
// more but held until the merge is durable, since the last durable checkpoint
// points at it.
type liveBits struct {
	segments map[seglog.SegmentID]*segmentLive
	total    int64
	held     int64        // of all segments
	last     *segmentLive // the one used last
	lastID   seglog.SegmentID
}

type segmentLive struct {
	bits bitmap
	live int
	held int
}

func (l *liveBits) of(s seglog.SegmentID) *segmentLive {
	if l.last != nil && l.lastID == s {
		return l.last
	}
	e := l.segments[s]
	if e == nil {
		if l.segments == nil {
			l.segments = make(map[seglog.SegmentID]*segmentLive)
		}
		e = &segmentLive{}
		l.segments[s] = e
	}
	l.last, l.lastID = e, s
	return e
}

func (l *liveBits) set(s seglog.SegmentID, at, mask uint16) {
	e := l.of(s)
	n := e.bits.set(at, mask)
	e.live += n
	l.total += int64(n)
}

func (l *liveBits) clear(s seglog.SegmentID, at, mask uint16) int {
	e := l.of(s)
	n := e.bits.clear(at, mask)
	e.live -= n
	l.total -= int64(n)
	return n
}

func (l *liveBits) get(s seglog.SegmentID, at, mask uint16) uint16 {
	return l.of(s).bits.get(at, mask)
}

// holds counts blocks per segment that must not be reused yet.
type holds map[seglog.SegmentID]int

func (l *liveBits) hold(h holds) {
	for s, n := range h {
		l.keep(s, n)
	}
}

func (l *liveBits) release(h holds) {
	for s, n := range h {
		l.keep(s, -n)
	}
}

// keep changes how many blocks of a segment must not be reused yet.
func (l *liveBits) keep(s seglog.SegmentID, n int) {
	l.of(s).held += n
	l.held += int64(n)
}
