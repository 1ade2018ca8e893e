package cluster

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// reading waits for a read and keeps its bytes.
type reading struct {
	outcome
	data []byte
}

func (s *scripted) read(ctx context.Context, a *Attachment, c block.Chunk, at block.Index, count int) *reading {
	r := &reading{}
	s.loop.Post(func() {
		a.Read(ctx, c, at, count, func(pieces []payload.Piece, err error) {
			for _, p := range pieces {
				if p.Buf == nil {
					r.data = append(r.data, make([]byte, p.Bytes)...)
					continue
				}
				r.data = append(r.data, p.Data()...)
				p.Buf.Release()
			}
			r.done(err)
		})
	})
	return r
}

// answerBlocks answers with data at block at, and holes around it.
func answerBlocks(q asked, applied uint64, bufs ...*payload.Buf) {
	r := wire.Response{Status: wire.StatusOK, Applied: block.MakeVersion(0, applied)}
	n := uint16(0)
	for _, b := range bufs {
		n += uint16(b.Len() / block.Size)
		r.CRCs = block.AppendCRCs(r.CRCs, b.Bytes())
	}
	r.Runs = []wire.Run{{Chunk: q.req.Chunk, Block: q.req.Block, Count: n, State: block.Data}}
	if n < q.req.Count {
		r.Runs = append(r.Runs, wire.Run{Chunk: q.req.Chunk, Block: q.req.Block + block.Index(n), Count: q.req.Count - n, State: block.Zero})
	}
	q.reply(r, bufs...)
}

func filled(v ...byte) *payload.Buf {
	b := payload.New(len(v) * block.Size)
	for i, x := range v {
		copy(b.Bytes()[i*block.Size:], bytes.Repeat([]byte{x}, block.Size))
	}
	return b
}

func TestReadPieces(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.script = func(q asked) bool {
		// Data, hole, data, zero: the data in two buffers cut elsewhere.
		bufs := []*payload.Buf{filled(1, 2, 3), filled(4)}
		r := wire.Response{Status: wire.StatusOK, Applied: block.MakeVersion(0, 77)}
		for _, b := range bufs {
			r.CRCs = block.AppendCRCs(r.CRCs, b.Bytes())
		}
		for _, run := range []wire.Run{{Block: 10, Count: 2}, {Block: 12, Count: 1, State: block.Hole}, {Block: 13, Count: 2}, {Block: 15, Count: 1, State: block.Zero}} {
			run.Chunk = q.req.Chunk
			r.Runs = append(r.Runs, run)
		}
		q.reply(r, bufs...)
		return true
	}
	r := s.read(t.Context(), a, 2, 10, 6)
	s.until("read", func() bool { return r.ended })
	var want []byte
	for _, v := range []byte{1, 2, 0, 3, 4, 0} {
		want = append(want, bytes.Repeat([]byte{v}, block.Size)...)
	}
	if r.err != nil || !bytes.Equal(r.data, want) {
		t.Fatalf("%v", r.err)
	}
	if got := a.Token(2); got != block.MakeVersion(0, 77) {
		t.Errorf("token %v", got)
	}
}

// TestReadsCarryTheHighestToken: each answer raises it, none lowers it (R1).
func TestReadsCarryTheHighestToken(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	fence := a.Token(0)
	if fence == 0 {
		t.Fatal("the Fence gave no token")
	}
	o := s.write(a, 0, 0, 1)
	s.until("write", func() bool { return o.ended })
	written := a.Token(0)
	if written <= fence {
		t.Errorf("token %v after the write, %v before", written, fence)
	}
	want := written
	for _, n := range []uint64{50, 40, 60, 59} {
		s.script = func(q asked) bool {
			if q.req.Token != want {
				t.Errorf("read with token %v, want %v", q.req.Token, want)
			}
			answerBlocks(q, n, filled(1))
			return true
		}
		r := s.read(t.Context(), a, 0, 0, 1)
		s.until("read", func() bool { return r.ended })
		want = max(want, block.MakeVersion(0, n))
	}
	if got := a.Token(0); got != block.MakeVersion(0, 60) {
		t.Errorf("token %v at the end", got)
	}
}

// TestReadsPassBadReplicas: one good replica is enough.
func TestReadsPassBadReplicas(t *testing.T) {
	rotten := func(q asked) {
		b := filled(9)
		r := wire.Response{Status: wire.StatusOK, Runs: []wire.Run{{Chunk: q.req.Chunk, Block: q.req.Block, Count: 1}}, CRCs: []uint32{block.CRC(b.Bytes()) + 1}}
		q.reply(r, b)
	}
	for name, bad := range map[string]func(s *scripted, q asked){
		"corrupt":    func(s *scripted, q asked) { q.reply(wire.Response{Status: wire.StatusCorrupt}) },
		"rotten":     func(s *scripted, q asked) { rotten(q) },
		"behind":     func(s *scripted, q asked) { q.reply(wire.Response{Status: wire.StatusNotReady}) },
		"busy":       func(s *scripted, q asked) { q.reply(wire.Response{Status: wire.StatusBusy}) },
		"slow":       func(s *scripted, q asked) { s.after(4*time.Second, func() { answerBlocks(q, 1, filled(9)) }) },
		"silent":     func(s *scripted, q asked) {},
		"cut":        func(s *scripted, q asked) { s.cut(q.node) },
		"short":      func(s *scripted, q asked) { answerBlocks(q, 1) },
		"other run":  func(s *scripted, q asked) { q.req.Block++; answerBlocks(q, 1, filled(9)) },
		"no replica": func(s *scripted, q asked) { q.reply(wire.Response{Status: wire.StatusUnknownGroup}) },
	} {
		t.Run(name, func(t *testing.T) {
			for good := block.NodeID(1); good <= 3; good++ {
				s := newScripted(t, 1<<30)
				a := s.attach()
				s.script = func(q asked) bool {
					if q.node == good {
						answerBlocks(q, 1, filled(7))
					} else {
						bad(s, q)
					}
					return true
				}
				began := s.Now()
				r := s.read(t.Context(), a, 0, 0, 1)
				s.until("read", func() bool { return r.ended })
				if r.err != nil || !bytes.Equal(r.data, bytes.Repeat([]byte{7}, block.Size)) {
					t.Errorf("good node %d: %v", good, r.err)
				}
				again := uint64(0)
				for _, q := range s.log {
					if q.req.Kind == wire.ReqRead {
						again++
					}
				}
				again-- // the first is none
				if c := s.client.Counters(); c.QueryRetries != again || c.BadReads+c.Corrupt+c.NotReady+c.Busy+c.Lost != again {
					t.Errorf("good node %d: %+v after %d retries", good, c, again)
				}
				if took := s.Now().Sub(began); took > 2500*time.Millisecond {
					t.Errorf("good node %d: took %v", good, took)
				}
			}
		})
	}
}

// TestSilentLeaderIsPassedBy: of many reads only a few pay for a node that does
// not answer.
func TestSilentLeaderIsPassedBy(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	dead := s.groups[1].leader
	s.silent[dead] = true
	s.script = func(q asked) bool {
		q.reply(wire.Response{Status: wire.StatusOK, Leader: dead, Applied: block.MakeVersion(0, 20),
			Runs: []wire.Run{{Chunk: q.req.Chunk, Block: q.req.Block, Count: q.req.Count, State: block.Hole}}})
		return true
	}
	began := s.Now()
	for range 60 {
		r := s.read(t.Context(), a, 0, 0, 1)
		s.until("read", func() bool { return r.ended })
	}
	if took := s.Now().Sub(began); took > 1200*time.Millisecond {
		t.Errorf("60 reads took %v", took)
	}
}

func TestCorruptEverywhere(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.script = func(q asked) bool {
		if q.req.Kind != wire.ReqRead {
			return false
		}
		q.reply(wire.Response{Status: wire.StatusCorrupt})
		return true
	}
	r := s.read(t.Context(), a, 0, 0, 1)
	s.until("read", func() bool { return r.ended })
	if !errors.Is(r.err, block.Corrupt) {
		t.Fatal(r.err)
	}
	// While a replica that may have a good copy is away, the read waits for it.
	s.silent[2] = true
	r = s.read(t.Context(), a, 0, 0, 1)
	s.RunFor(20 * time.Second)
	if r.ended {
		t.Fatalf("%v", r.err)
	}
	s.silent[2] = false
	s.until("read", func() bool { return r.ended })
	if !errors.Is(r.err, block.Corrupt) {
		t.Fatal(r.err)
	}
}

func TestReadIsGivenUp(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.script = func(q asked) bool { return true }
	ctx, cancel := context.WithCancel(t.Context())
	r := s.read(ctx, a, 0, 0, 1)
	s.RunFor(100 * time.Millisecond)
	cancel()
	s.RunFor(time.Second)
	if !errors.Is(r.err, block.Canceled) {
		t.Fatalf("%v", r.err)
	}
	if len(s.client.calls) != 0 || a.queries.first != nil {
		t.Error("something is left of it")
	}
}

// TestPastTheLease: without the store no other replica than the leader is
// believed (F4), and I/O goes on; afterwards everything is as before.
func TestPastTheLease(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	s.mem.SetDown(true)
	s.RunFor(4 * time.Second)
	before := len(s.log)
	r := s.read(t.Context(), a, 0, 0, 1)
	o := s.write(a, 0, 0, 1)
	s.until("read and write", func() bool { return r.ended && o.ended })
	if r.err != nil || o.err != nil {
		t.Fatalf("%v, %v", r.err, o.err)
	}
	for _, q := range s.log[before:] {
		if q.req.Kind == wire.ReqRead && !q.req.LeaderOnly {
			t.Errorf("node %d was asked without ReadIndex", q.node)
		}
	}
	s.mem.SetDown(false)
	s.until("a lease", a.current)
	before = len(s.log)
	r = s.read(t.Context(), a, 0, 0, 1)
	s.until("read", func() bool { return r.ended })
	if s.log[len(s.log)-1].req.LeaderOnly {
		t.Error("still asks leaders only")
	}
}

// TestLateFollowerAnswer: what a replica was asked under the lease and answers
// after it is not believed (F4).
func TestLateFollowerAnswer(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	var held []asked
	s.script = func(q asked) bool {
		held = append(held, q)
		return true
	}
	s.mem.SetDown(true)
	s.until("the end of the lease is near", func() bool { return s.client.session.ValidUntil().Sub(s.loop.Now()) < 250*time.Millisecond })
	r := s.read(t.Context(), a, 0, 0, 1)
	s.RunFor(270 * time.Millisecond)
	if len(held) != 1 || held[0].req.LeaderOnly || a.current() {
		t.Fatalf("%d asked, the first %+v, lease stands: %v", len(held), held[0].req, a.current())
	}
	answerBlocks(held[0], 20, filled(9))
	s.RunFor(time.Millisecond)
	if r.ended {
		t.Fatal("the answer was believed")
	}
	s.script = nil
	s.until("read", func() bool { return r.ended })
	if last := s.log[len(s.log)-1]; r.err != nil || !last.req.LeaderOnly {
		t.Errorf("%v, %+v", r.err, last.req)
	}
}

func TestMap(t *testing.T) {
	s := newScripted(t, 2<<40)
	a := s.attach()
	s.script = func(q asked) bool {
		if q.req.Kind != wire.ReqMap {
			return false
		}
		r := wire.Response{Status: wire.StatusOK, Covered: q.req.ToChunk}
		for c := q.req.Chunk; c < min(q.req.ToChunk, q.req.Chunk+40); c++ {
			if c%testGroups != block.Chunk(q.req.Group-1) {
				continue
			}
			if c%2 == 0 {
				r.Runs = append(r.Runs, wire.Run{Chunk: c, Block: 0, Count: 1024})
			} else {
				r.Runs = append(r.Runs, wire.Run{Chunk: c, Block: 0, Count: 24}, wire.Run{Chunk: c, Block: 100, Count: 10, State: block.Zero})
			}
		}
		if q.req.Group == 2 {
			r.Covered = q.req.Chunk + 30
		}
		q.reply(r)
		return true
	}
	var got []block.Extent
	o := &outcome{}
	s.loop.Post(func() {
		a.Map(t.Context(), 8, 900000, func(e []block.Extent, err error) { got = e; o.done(err) })
	})
	s.until("map", func() bool { return o.ended })
	if o.err != nil {
		t.Fatal(o.err)
	}
	at := block.Offset(8, 0)
	for i, e := range got {
		if i > 0 && got[i-1].State == e.State {
			t.Errorf("not merged: %v", got)
		}
		for off := at; off < at+e.Bytes; off += block.Size {
			want, b := block.Data, block.IndexAt(off)
			if block.ChunkAt(off)%2 == 1 && b >= 24 {
				want = block.Hole
				if b >= 100 && b < 110 {
					want = block.Zero
				}
			}
			if e.State != want {
				t.Fatalf("offset %d is %d, want %d", off, e.State, want)
			}
		}
		at += e.Bytes
	}
	if at != block.Offset(38, 0) {
		t.Errorf("covered to %d", at)
	}
}
