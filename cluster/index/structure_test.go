package index

import (
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"firn.io/firn/internal/block"
)

func TestChunkTable(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var table chunkTable
		want := map[block.Chunk]block.Version{}
		chunk := rapid.Custom(func(t *rapid.T) block.Chunk {
			return block.Chunk(rapid.SampledFrom([]int{0, 1024, 1 << 20, maxChunk - 1024}).Draw(t, "page") + rapid.IntRange(0, 1023).Draw(t, "chunk"))
		})
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				c, v := chunk.Draw(t, "at"), block.Version(rapid.Uint64().Draw(t, "version"))
				table.set(c, v)
				want[c] = v
			},
			"remove": func(t *rapid.T) {
				c := chunk.Draw(t, "at")
				if len(want) > 0 && rapid.Bool().Draw(t, "known") {
					c = slices.Sorted(maps.Keys(want))[0]
				}
				table.remove(c)
				delete(want, c)
			},
			"": func(t *rapid.T) {
				var got []block.Chunk
				for c, ok := table.next(0); ok; c, ok = table.next(c + 1) {
					got = append(got, c)
					if v, ok := table.get(c); !ok || v != want[c] {
						t.Fatalf("chunk %d: %v, %v", c, v, ok)
					}
				}
				if !slices.Equal(got, slices.Sorted(maps.Keys(want))) || table.count != len(want) {
					t.Fatalf("%v, want %v", got, want)
				}
				c := chunk.Draw(t, "from")
				next, ok := table.next(c)
				i, _ := slices.BinarySearch(got, c)
				if ok != (i < len(got)) || ok && next != got[i] {
					t.Fatalf("next of %d is %d, %v", c, next, ok)
				}
			},
		})
	})
}

func TestMarkers(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		m := &markers{}
		stored := &markers{} // what diffs have made of an empty store
		type mark struct {
			gen     block.Generation
			written block.Version
		}
		var want [40][]mark // by chunk, oldest first
		var at block.Version
		var gen block.Generation
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				at++
				gen += block.Generation(rapid.SampledFrom([]int{0, 0, 0, 1}).Draw(t, "snapshot"))
				from := rapid.IntRange(0, 39).Draw(t, "from")
				to := rapid.IntRange(from+1, 40).Draw(t, "to")
				m.add(gen, span{block.Chunk(from), block.Chunk(to), at})
				for c := from; c < to; c++ {
					want[c] = slices.DeleteFunc(want[c], func(m mark) bool { return m.gen == gen })
					want[c] = append(want[c], mark{gen, at})
				}
			},
			"remove": func(t *rapid.T) {
				if len(m.layers) == 0 {
					return
				}
				l := &m.layers[rapid.IntRange(0, len(m.layers)-1).Draw(t, "layer")]
				g, s := l.gen, l.spans[rapid.IntRange(0, len(l.spans)-1).Draw(t, "span")]
				s.to = min(s.to, s.from+block.Chunk(rapid.IntRange(1, 40).Draw(t, "length")))
				m.remove(g, s)
				for c := s.from; c < s.to; c++ {
					want[c] = slices.DeleteFunc(want[c], func(m mark) bool { return m.gen == g && m.written == s.written })
				}
			},
			"store": func(t *rapid.T) {
				next := stored.clone()
				diffMarkers(stored, m, func(g block.Generation, s span) { next.remove(g, s) },
					func(g block.Generation, s span) { next.add(g, s) })
				stored = next
				none := func(g block.Generation, s span) { t.Fatalf("after a diff %d %v is left", g, s) }
				diffMarkers(stored, m, none, none)
			},
			"": func(t *rapid.T) {
				for c := range want {
					for g := range gen + 2 {
						var best mark
						for _, m := range want[c] {
							if m.gen <= g {
								best = m
							}
						}
						gotGen, written, ok := m.newest(block.Chunk(c), g)
						if ok != (best.written != 0) || ok && (gotGen != best.gen || written != best.written) {
							t.Fatalf("chunk %d at %d: %d %v %v, want %v", c, g, gotGen, written, ok, best)
						}
					}
				}
			},
		})
	})
}

func TestBitmap(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var b bitmap
		want := map[int]bool{}
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				at := rapid.SampledFrom([]uint16{0, 1, 47, 48, 50, 60, 63, 64, 100, 65520}).Draw(t, "at")
				mask := rapid.Uint16Range(1, 65535).Draw(t, "mask")
				set := rapid.Bool().Draw(t, "set")
				n := 0
				for i := range 16 {
					if mask&(1<<i) != 0 && want[int(at)+i] != set {
						n++
						want[int(at)+i] = set
					}
				}
				got := 0
				if set {
					got = b.set(at, mask)
				} else {
					got = b.clear(at, mask)
				}
				if got != n {
					t.Fatalf("changed %d, want %d", got, n)
				}
			},
			"store": func(t *rapid.T) {
				if b.count() == 0 {
					return
				}
				p := appendBitmap(nil, b)
				got, err := decodeBitmap(p)
				if err != nil {
					t.Fatal(err)
				}
				b = got
			},
			"": func(t *rapid.T) {
				at := rapid.Uint16Range(0, 65535).Draw(t, "get")
				var v uint16
				n := 0
				for i, set := range want {
					if set {
						n++
						if i >= int(at) && i < int(at)+16 {
							v |= 1 << (i - int(at))
						}
					}
				}
				if got := b.get(at, 0xffff); got != v || b.count() != n {
					t.Fatalf("%x, want %x; %d bits, want %d", got, v, b.count(), n)
				}
			},
		})
	})
}

// TestResolve compares the cell's passes with a block by block definition.
func TestResolve(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		keep := retention{from: block.Generation(rapid.IntRange(0, 5).Draw(t, "from"))}
		for g := range keep.from {
			if rapid.Bool().Draw(t, "retained") {
				keep.list = append(keep.list, g)
			}
		}
		var c cell
		n := rapid.IntRange(0, 6).Draw(t, "candidates")
		for i := range n {
			k := candidate{written: block.Version(i + 1), layer: rapid.SampledFrom([]layer{layerFrozen, layerStore, layerMarker}).Draw(t, "layer"), src: i}
			k.gen = block.Generation(i * 5 / 6)
			k.from = uint8(rapid.IntRange(0, 15).Draw(t, "first"))
			k.count = uint8(rapid.IntRange(1, 16-int(k.from)).Draw(t, "count"))
			if k.layer == layerMarker {
				k.from, k.count = 0, 16
			}
			c.add(k)
		}
		c.resolve(&keep)
		if !slices.IsSortedFunc(c.cands, func(a, b candidate) int {
			if newer(&a, &b) {
				return -1
			}
			return 1
		}) {
			t.Fatalf("not in order: %+v", c.cands)
		}
		for b := range 16 {
			for i := range c.cands {
				for _, markers := range []bool{true, false} {
					k := &c.cands[i]
					if k.cover&(1<<b) == 0 || !markers && k.layer == layerMarker {
						continue
					}
					live := true
					for j := range c.cands[:i] {
						if o := &c.cands[j]; o.cover&(1<<b) != 0 && (markers || o.layer != layerMarker) {
							live = keep.needs(k.gen, o.gen)
						}
					}
					got := k.live
					if !markers {
						got = k.plain
					}
					if (got&(1<<b) != 0) != live {
						t.Fatalf("block %d of candidate %d of %+v, with markers %v: want %v", b, i, c.cands, markers, live)
					}
				}
			}
		}
	})
}
