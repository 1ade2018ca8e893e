package index_test

import (
	"testing"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// source is a replica with a bit of everything, in its store.
func source(t testing.TB) *group {
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	for b := range 20 {
		cmd := g.next(write(1, 0, 0, block.Index(b*3)))
		cmd.Chunk = block.Chunk(b % 4)
		g.want(wire.OutcomeApplied, cmd)
	}
	g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdZero, Chunk: 1, Block: 9, Count: 30}))
	g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, Chunk: 2, ToChunk: 4}))
	g.checkpoint()
	return g
}

// records are all of a view, in the order in which a copy asks for them.
func records(t testing.TB, v *index.View) (head, table, extents []index.Record) {
	all := func(from, to []byte) []index.Record {
		recs, next, err := v.Scan(from, to, 1<<20)
		if err != nil || next != nil {
			t.Fatal(err)
		}
		return recs
	}
	from, to := index.HeadRange()
	head = all(from, to)
	from, to = index.TableRange()
	table = all(from, to)
	from, to = index.ChunkID{Volume: 1, Chunk: 1}.Range()
	return head, table, all(from, to)
}

// FuzzCopy gives a copy records that one byte, or one length, is wrong of: it
// refuses them or takes them, and what it then writes opens again.
func FuzzCopy(f *testing.F) {
	for at := range 8 {
		f.Add(uint16(at*17), byte(at), true)
		f.Add(uint16(at*5), byte(255-at), false)
	}
	f.Fuzz(func(t *testing.T, at uint16, with byte, cut bool) {
		g := source(t)
		view := g.r.View()
		head, table, extents := records(t, view)
		view.Release()
		spoil(at, with, cut, head, table, extents)

		store := memstore.New()
		db, err := index.Open(store, index.Options{})
		if err != nil {
			t.Fatal(err)
		}
		r, err := db.Create(seglog.ReplicaKey{Group: 3, Replica: 2}, index.Creation{Index: firstIndex, Term: firstTerm, Conf: []byte("c")})
		if err != nil {
			t.Fatal(err)
		}
		do := func(j *index.Job) {
			j.Run()
			if err := j.Finish(); err != nil {
				t.Fatal(err)
			}
		}
		do(r.StartCheckpoint())
		c := r.NewCopy()
		if c.Head(head) != nil {
			return
		}
		if _, _, _, err := c.HeadDone(); err != nil || c.Table(table) != nil {
			return
		}
		c.TableDone()
		do(c.Begin())
		for {
			ids := c.Next(4)
			if c.Ended() {
				break
			}
			for _, id := range ids {
				if id == (index.ChunkID{Volume: 1, Chunk: 1}) && c.Extents(id, extents) != nil {
					c.Abandon()
					return
				}
			}
			do(c.Compare())
			needs := c.Needs()
			for i := range needs {
				c.Placed(&needs[i], 0, len(needs[i].Record.CRCs), seglog.Location{Segment: seglog.SegmentID(i + 1), Block: 100})
			}
			do(c.Replace())
		}
		do(c.Finish())
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := index.Open(store, index.Options{}); err != nil {
			t.Fatalf("what a copy wrote does not open: %v", err)
		}
	})
}

// spoil changes byte at of all keys and values together, or cuts a value there.
func spoil(at uint16, with byte, cut bool, parts ...[]index.Record) {
	n := int(at)
	for _, recs := range parts {
		for i := range recs {
			for _, p := range []*[]byte{&recs[i].Key, &recs[i].Value} {
				if n >= len(*p) {
					n -= len(*p)
					continue
				}
				if cut {
					*p = (*p)[:n]
				} else {
					(*p)[n] ^= with
				}
				return
			}
		}
	}
}
