package index_test

import (
	"math/rand/v2"
	"sync"
	"testing"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// TestWorkOffTheLoop runs jobs and loads beside apply, over Pebble: what they
// capture is theirs alone. The race detector is the judge of half of it.
func TestWorkOffTheLoop(t *testing.T) {
	t.Parallel()
	store, err := pebblestore.Open(t.TempDir(), pebblestore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	g := newGroup(t, store)
	g.want(wire.OutcomeApplied, fence(1, 1))
	rng := rand.New(rand.NewPCG(1, 1))
	newest := map[[2]int]uint64{}
	var wg sync.WaitGroup
	var job *index.Job
	ended := make(chan struct{}, 1)
	start := func() {
		switch rng.IntN(3) {
		case 0:
			job = g.r.StartCheckpoint()
		case 1:
			job = g.r.StartReap(100)
		case 2:
			job = g.db.StartFlush()
		}
		if j := job; j != nil {
			wg.Go(func() { j.Run(); ended <- struct{}{} })
		}
	}
	type loaded struct {
		l    *index.Lookup
		want uint64
		err  error
	}
	loads := make(chan *loaded, 64)
	open := 0
	finish := func(p *loaded) {
		open--
		run := p.l.Runs()[0]
		if p.err != nil || (run.State == block.Data) != (p.want != 0) || p.want != 0 && run.Written.RaftIndex() != p.want {
			t.Fatalf("%+v, want entry %d, %v", run, p.want, p.err)
		}
		p.l.Release()
	}
	for i := range 20000 {
		c, b := rng.IntN(8), rng.IntN(200)
		if i%500 == 499 {
			g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, Chunk: block.Chunk(c), ToChunk: block.Chunk(c + 1)}))
			for b := range 200 {
				delete(newest, [2]int{c, b})
			}
		} else {
			cmd := g.next(write(1, 0, 0, block.Index(b)))
			cmd.Chunk = block.Chunk(c)
			g.at.Segment, g.at.Block = g.at.Segment+1, 0
			newest[[2]int{c, b}] = g.want(wire.OutcomeApplied, cmd).Version.RaftIndex()
		}
		if job == nil {
			start()
		}
		select {
		case <-ended:
			if err := job.Finish(); err != nil {
				t.Fatal(err)
			}
			job = nil
		case p := <-loads:
			finish(p)
		default:
		}
		if i%10 == 0 && open < cap(loads) {
			c, b := rng.IntN(8), rng.IntN(200)
			p := &loaded{l: g.r.Lookup(index.Query{Volume: vol, Generation: block.GenerationLatest, Chunk: block.Chunk(c), Block: block.Index(b), Count: 1}),
				want: newest[[2]int{c, b}]}
			open++
			if !p.l.Pending() {
				finish(p)
				continue
			}
			wg.Go(func() { p.err = p.l.Load(); loads <- p })
		}
	}
	wg.Wait()
	if job != nil {
		if err := job.Finish(); err != nil {
			t.Fatal(err)
		}
	}
	for open > 0 {
		finish(<-loads)
	}
	if err := g.db.CheckLive(true); err != nil {
		t.Fatal(err)
	}
	if err := g.db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
}
