package index

import (
	"slices"
	"sort"

	"firn.io/firn/internal/block"
)

// span is a part of a range marker that no newer marker of its generation
// covers.
type span struct {
	from, to block.Chunk // to is exclusive
	written  block.Version
}

// markers are the range markers of a volume (S3), one layer per generation,
// ascending; the spans of a layer are in order and disjoint. Since generations
// do not fall, a higher layer is newer. There is nearly always one layer, and
// adding a marker over everything costs what it replaces.
type markers struct {
	layers []markerLayer
}

type markerLayer struct {
	gen   block.Generation
	spans []span
}

func (m *markers) clone() *markers {
	c := &markers{layers: slices.Clone(m.layers)}
	for i := range c.layers {
		c.layers[i].spans = slices.Clone(c.layers[i].spans)
	}
	return c
}

func (m *markers) count() int {
	n := 0
	for i := range m.layers {
		n += len(m.layers[i].spans)
	}
	return n
}

// at returns the span of the layer over c.
func (l *markerLayer) at(c block.Chunk) (span, bool) {
	i := sort.Search(len(l.spans), func(i int) bool { return l.spans[i].to > c })
	if i < len(l.spans) && l.spans[i].from <= c {
		return l.spans[i], true
	}
	return span{}, false
}

// newest returns the newest marker over c that a view of generation g sees.
func (m *markers) newest(c block.Chunk, g block.Generation) (block.Generation, block.Version, bool) {
	for i := len(m.layers) - 1; i >= 0; i-- {
		l := &m.layers[i]
		if l.gen > g {
			continue
		}
		if s, ok := l.at(c); ok {
			return l.gen, s.written, true
		}
	}
	return 0, 0, false
}

// hide tells whether some marker hides an extent of c from all views.
func (m *markers) hide(c block.Chunk, g block.Generation, written block.Version, keep *retention) bool {
	for i := range m.layers {
		l := &m.layers[i]
		if s, ok := l.at(c); ok && l.gen >= g && s.written > written && !keep.needs(g, l.gen) {
			return true
		}
	}
	return false
}

// add puts a marker over what its layer has in [from, to). It is newer than
// all that are there.
func (m *markers) add(g block.Generation, s span) {
	i := sort.Search(len(m.layers), func(i int) bool { return m.layers[i].gen >= g })
	if i == len(m.layers) || m.layers[i].gen != g {
		m.layers = slices.Insert(m.layers, i, markerLayer{gen: g})
	}
	m.layers[i].replace(s.from, s.to, []span{s}, func(span) bool { return true })
}

// remove takes the marker of generation g that was written at s.written out of
// [s.from, s.to), where it was not replaced yet.
func (m *markers) remove(g block.Generation, s span) {
	for i := range m.layers {
		if m.layers[i].gen != g {
			continue
		}
		m.layers[i].replace(s.from, s.to, nil, func(old span) bool { return old.written == s.written })
		if len(m.layers[i].spans) == 0 {
			m.layers = slices.Delete(m.layers, i, i+1)
		}
		return
	}
}

// replace cuts the spans for which cut is true out of [from, to) and puts with
// in their place.
func (l *markerLayer) replace(from, to block.Chunk, with []span, cut func(span) bool) {
	lo := sort.Search(len(l.spans), func(i int) bool { return l.spans[i].to > from })
	hi := sort.Search(len(l.spans), func(i int) bool { return l.spans[i].from >= to })
	hi = max(lo, hi)
	var keep []span
	for _, s := range l.spans[lo:hi] {
		if !cut(s) {
			keep = append(keep, s)
			continue
		}
		if s.from < from {
			keep = append(keep, span{s.from, from, s.written})
		}
		if s.to > to {
			keep = append(keep, span{to, s.to, s.written})
		}
	}
	keep = append(keep, with...)
	slices.SortFunc(keep, func(a, b span) int { return int(int64(a.from) - int64(b.from)) })
	l.spans = slices.Replace(l.spans, lo, hi, keep...)
}

// diff calls gone for the stored spans that new lacks and come for those that
// it has and old lacks or has otherwise.
func diffMarkers(old, new *markers, gone, come func(block.Generation, span)) {
	if old == new {
		return
	}
	each := func(a, b *markers, f func(block.Generation, span), values bool) {
		for i := range a.layers {
			l := &a.layers[i]
			other := markerLayer{}
			for j := range b.layers {
				if b.layers[j].gen == l.gen {
					other = b.layers[j]
				}
			}
			for _, s := range l.spans {
				o, ok := other.at(s.from)
				if !ok || o.from != s.from || o.to != s.to || values && o.written != s.written {
					f(l.gen, s)
				}
			}
		}
	}
	each(old, new, gone, false)
	each(new, old, come, true)
}
