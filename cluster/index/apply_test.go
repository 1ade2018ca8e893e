package index_test

import (
	"errors"
	"fmt"
	"testing"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

var vol = block.VolumeID{7}

// group is one replica and what it takes to feed it.
type group struct {
	t     testing.TB
	store index.Store
	db    *index.DB
	r     *index.Replica
	at    seglog.Location
	op    block.OpSeq
}

var key = seglog.ReplicaKey{Group: 3, Replica: 1}

func newGroup(t testing.TB, store index.Store) *group {
	g := &group{t: t, store: store, at: seglog.Location{Segment: 1}}
	var err error
	if g.db, err = index.Open(store, index.Options{}); err != nil {
		t.Fatal(err)
	}
	if g.r = g.db.Replica(key); g.r == nil {
		if g.r, err = g.db.Create(key, index.Creation{Index: firstIndex, Term: firstTerm, Conf: []byte("c")}); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

func (g *group) apply(cmd wire.Command) wire.ApplyResult {
	g.t.Helper()
	at, term := g.r.Applied()
	cmd.Volume = vol
	res, err := g.r.Apply(at+1, term, &cmd, g.at)
	if err != nil {
		g.t.Fatal(err)
	}
	g.at.Block += cmd.Count
	return res
}

func (g *group) want(o wire.Outcome, cmd wire.Command) wire.ApplyResult {
	g.t.Helper()
	res := g.apply(cmd)
	if res.Outcome != o {
		g.t.Fatalf("outcome %d, want %d: %+v", res.Outcome, o, cmd)
	}
	return res
}

func fence(epoch block.Epoch, nonce block.Nonce) wire.Command {
	return wire.Command{Type: wire.CmdFence, Epoch: epoch, Nonce: nonce, Size: 1 << 30, Settings: 1, VolumeValue: []byte("v")}
}

func write(epoch block.Epoch, op, floor block.OpSeq, b block.Index) wire.Command {
	return wire.Command{Type: wire.CmdWrite, Epoch: epoch, Nonce: block.Nonce(epoch), OpSeq: op, Floor: floor, Block: b, Count: 1,
		PayloadBytes: block.Size, CRCs: []uint32{uint32(op)}}
}

// next is the next operation of epoch 1, with nothing else in flight.
func (g *group) next(cmd wire.Command) wire.Command {
	g.op++
	cmd.Epoch, cmd.Nonce, cmd.OpSeq, cmd.Floor = 1, 1, g.op, g.op
	return cmd
}

func (g *group) writtenAt(c block.Chunk, b block.Index) uint64 {
	g.t.Helper()
	run := g.look(index.Query{Volume: vol, Generation: block.GenerationLatest, Chunk: c, Block: b, Count: 1})[0]
	if run.State != block.Data {
		return 0
	}
	return run.Written.RaftIndex()
}

func (g *group) look(q index.Query) []index.Run {
	g.t.Helper()
	l := g.r.Lookup(q)
	defer l.Release()
	if l.Pending() {
		if err := l.Load(); err != nil {
			g.t.Fatal(err)
		}
	}
	return append([]index.Run(nil), l.Runs()...)
}

func (g *group) do(j *index.Job) {
	g.t.Helper()
	if j == nil {
		g.t.Fatal("no job to do")
	}
	j.Run()
	if err := j.Finish(); err != nil {
		g.t.Fatal(err)
	}
}

func (g *group) checkpoint() {
	g.t.Helper()
	g.do(g.r.StartCheckpoint())
}

func (g *group) flush() {
	g.t.Helper()
	g.do(g.db.StartFlush())
}

// TestOperationHistories is the table of W3, W4 and F2. Each step is a command
// and its outcome; block 0 shows what landed.
func TestOperationHistories(t *testing.T) {
	t.Parallel()
	type step struct {
		cmd  wire.Command
		want wire.Outcome
	}
	readOnly := fence(1, 1)
	readOnly.Settings, readOnly.Flags = 2, wire.FlagReadOnlyVolume
	writable := fence(1, 1)
	writable.Settings = 3
	beyond := write(1, 1, 1, 0)
	beyond.Chunk = 1 << 20
	grow := fence(1, 1)
	grow.Settings, grow.Size = 2, 1<<50
	tests := map[string]struct {
		steps []step
		shows int // the step whose write block 0 shows in the end; -1 for none
	}{
		"a retry takes effect once": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeApplied}, {write(1, 2, 1, 0), wire.OutcomeApplied},
			{write(1, 1, 1, 0), wire.OutcomeApplied},
		}, 2},
		"an old one lands below the floor": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 5, 5, 0), wire.OutcomeApplied}, {write(1, 4, 4, 0), wire.OutcomeBelowFloor},
		}, 1},
		"the floor is raised before it judges": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 5000, 4999, 0), wire.OutcomeApplied},
		}, 1},
		"beyond the window ends nothing": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 4097, 1, 0), wire.OutcomeBeyondWindow}, {write(1, 4097, 2, 0), wire.OutcomeApplied},
		}, 2},
		"beyond the window raises the floor": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 5000, 10, 0), wire.OutcomeBeyondWindow}, {write(1, 9, 9, 0), wire.OutcomeBelowFloor},
		}, -1},
		"a refusal is remembered as what it was": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {beyond, wire.OutcomeOutOfRange}, {grow, wire.OutcomeApplied}, {beyond, wire.OutcomeOutOfRange},
		}, -1},
		"read-only is remembered": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {readOnly, wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeReadOnly},
			{writable, wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeReadOnly}, {write(1, 2, 1, 0), wire.OutcomeApplied},
		}, 5},
		"an older epoch is fenced": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {fence(2, 2), wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeOldEpoch}, {fence(1, 1), wire.OutcomeOldEpoch},
		}, -1},
		"a new epoch starts its own window": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeApplied}, {fence(2, 2), wire.OutcomeApplied}, {write(2, 1, 1, 0), wire.OutcomeApplied},
		}, 3},
		"a repeated fence resets nothing": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeApplied}, {write(1, 2, 1, 0), wire.OutcomeApplied},
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeApplied},
		}, 2},
		"another nonce of the same epoch is refused": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {fence(1, 9), wire.OutcomeOldEpoch}, {write(1, 1, 1, 0), wire.OutcomeApplied},
		}, 2},
		"an epoch that was not fenced here writes nothing": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(2, 1, 1, 0), wire.OutcomeOldEpoch},
		}, -1},
		"an unknown volume": {[]step{{write(1, 1, 1, 0), wire.OutcomeNoVolume}}, -1},
		"a tombstone stays": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 1, 1, 0), wire.OutcomeApplied}, {wire.Command{Type: wire.CmdDelete}, wire.OutcomeApplied},
			{write(1, 2, 1, 0), wire.OutcomeNoVolume}, {fence(2, 2), wire.OutcomeNoVolume}, {wire.Command{Type: wire.CmdDelete}, wire.OutcomeApplied},
		}, -1},
		"a late fence of a volume that was deleted unseen": {[]step{
			{wire.Command{Type: wire.CmdDelete}, wire.OutcomeApplied}, {fence(1, 1), wire.OutcomeNoVolume},
		}, -1},
		"opSeq 0": {[]step{{fence(1, 1), wire.OutcomeApplied}, {write(1, 0, 0, 0), wire.OutcomeInvalid}}, -1},
		"a floor above its own opSeq": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 3, 4, 0), wire.OutcomeInvalid}, {write(1, 1, 1, 0), wire.OutcomeApplied},
		}, 2},
		"absurd numbers": {[]step{
			{fence(1, 1), wire.OutcomeApplied}, {write(1, 1<<64-1, 1<<64-1, 0), wire.OutcomeInvalid}, {write(1, 1, 1, 0), wire.OutcomeApplied},
		}, 2},
	}
	for name, test := range tests {
		// Every prefix of the history survives a checkpoint and a restart.
		for cut := range test.steps {
			t.Run(fmt.Sprintf("%s/%d", name, cut), func(t *testing.T) {
				t.Parallel()
				g := newGroup(t, memstore.New())
				for i, s := range test.steps {
					if res := g.want(s.want, s.cmd); res.Version != block.MakeVersion(0, uint64(firstIndex+1+i)) {
						t.Errorf("step %d answers version %v", i, res.Version)
					}
					if i == cut {
						g.checkpoint()
						g.flush()
						g = newGroup(t, g.store.(*memstore.Store).Crash(0))
					}
				}
				want := uint64(0)
				if test.shows >= 0 {
					want = uint64(firstIndex + 1 + test.shows)
				}
				if got := g.writtenAt(0, 0); got != want {
					t.Errorf("block 0 is of entry %d, want %d", got, want)
				}
			})
		}
	}
}

func TestFenceAnswersWhatItReplaced(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 11))
	for range 2 {
		res := g.want(wire.OutcomeApplied, fence(4, 44))
		if res.ReplacedEpoch != 1 || res.ReplacedNonce != 11 || res.Record.Epoch != 4 || string(res.Record.VolumeValue) != "v" {
			t.Fatalf("%+v", res)
		}
		g.checkpoint()
		g.flush()
		g = newGroup(t, g.store.(*memstore.Store).Crash(0))
	}
	res := g.want(wire.OutcomeOldEpoch, fence(3, 33))
	if res.Record.Epoch != 4 || res.Record.Nonce != 44 || res.ReplacedEpoch != 0 {
		t.Fatalf("a refused fence answers %+v", res)
	}
}

// TestSizesGoWithTheSettings: a late fence does not undo a grow (F2).
func TestSizesGoWithTheSettings(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	grown := fence(1, 1)
	grown.Type, grown.Size, grown.Settings, grown.VolumeValue = wire.CmdResize, 2<<30, 2, []byte("grown")
	g.want(wire.OutcomeApplied, grown)
	late := fence(2, 2)
	late.Generation = 3
	res := g.want(wire.OutcomeApplied, late)
	if r := res.Record; r.Size != 2<<30 || string(r.VolumeValue) != "grown" || r.Epoch != 2 || r.Generation != 3 {
		t.Fatalf("%+v", r)
	}
	again := fence(3, 3)
	again.Settings, again.Size, again.Generation = 2, 5, 1
	if r := g.want(wire.OutcomeApplied, again).Record; r.Size != 2<<30 || r.Generation != 3 {
		t.Fatalf("%+v", r)
	}
	g.want(wire.OutcomeOldGeneration, write(3, 1, 1, 0))
	judged := wire.Command{Type: wire.CmdResize, Epoch: 3, Nonce: 3, OpSeq: 2, Floor: 1, Size: 4096, Settings: 9}
	g.want(wire.OutcomeApplied, judged)
	judged.Size = 1 << 20
	if r := g.want(wire.OutcomeApplied, judged).Record; r.Size != 4096 {
		t.Fatalf("a repeated resize took effect: %+v", r)
	}
	g.want(wire.OutcomeInvalid, wire.Command{Type: wire.CmdResize, Size: -1, Settings: 10})
}

func TestSensibleCommands(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	bad := []func(*wire.Command){
		func(c *wire.Command) { c.Count = 0 },
		func(c *wire.Command) { c.Block = 1023; c.Count = 2; c.CRCs = make([]uint32, 2); c.PayloadBytes = 8192 },
		func(c *wire.Command) { c.Block = 60000 },
		func(c *wire.Command) { c.Block, c.Count = 65535, 65535 },
		func(c *wire.Command) { c.CRCs = nil },
		func(c *wire.Command) { c.PayloadBytes = 1 },
		func(c *wire.Command) { c.Codec = 1 },
		func(c *wire.Command) { c.KeyID = 1 },
		func(c *wire.Command) { c.Count = 257; c.CRCs = make([]uint32, 257); c.PayloadBytes = 257 * 4096 },
		func(c *wire.Command) { c.Generation = block.GenerationLatest },
		func(c *wire.Command) { c.Type = wire.CmdMark; c.Chunk, c.ToChunk = 3, 3 },
	}
	for i, spoil := range bad {
		cmd := g.next(write(1, 0, 0, 0))
		spoil(&cmd)
		if res := g.apply(cmd); res.Outcome != wire.OutcomeInvalid {
			t.Errorf("case %d: outcome %d", i, res.Outcome)
		}
	}
	last := g.next(wire.Command{Type: wire.CmdMark, Chunk: 255, ToChunk: 257})
	g.want(wire.OutcomeOutOfRange, last)
	last = g.next(wire.Command{Type: wire.CmdMark, Chunk: 255, ToChunk: 256})
	g.want(wire.OutcomeApplied, last)
}

func TestUnknownCommandsHalt(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	for _, cmd := range []wire.Command{{Type: 200}, {Type: wire.CmdFeature, Feature: index.FeatureLevel + 1}} {
		if _, err := g.r.Apply(firstIndex+1, 6, &cmd, g.at); !errors.Is(err, block.Unsupported) {
			t.Errorf("%+v: %v", cmd, err)
		}
	}
	if at, _ := g.r.Applied(); at != firstIndex {
		t.Errorf("applied %d after a refusal", at)
	}
	if _, err := g.r.Apply(firstIndex+2, 6, &wire.Command{Type: wire.CmdFeature}, g.at); err == nil {
		t.Error("an entry was skipped")
	}
	g.want(wire.OutcomeApplied, wire.Command{Type: wire.CmdFeature, Feature: 1})
	if err := errors.Join(g.r.ApplyEmpty(firstIndex+2, 7), g.r.ApplyConf(firstIndex+3, 7, []byte("other"))); err != nil {
		t.Fatal(err)
	}
	g.checkpoint()
	g.flush()
	g = newGroup(t, g.store.(*memstore.Store).Crash(0))
	if at, term := g.r.Applied(); at != firstIndex+3 || term != 7 || string(g.r.Conf()) != "other" || g.r.Feature() != 1 {
		t.Errorf("after a restart %d %d %q %d", at, term, g.r.Conf(), g.r.Feature())
	}
}

// TestTrimEverything: the marker hides at once, the reaper takes away what it
// hides and then itself, and versions do not fall (S3, S4).
func TestTrimEverything(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	for c := range block.Chunk(8) {
		for b := range block.Index(40) {
			cmd := g.next(write(1, 0, 0, b))
			cmd.Chunk = c
			g.want(wire.OutcomeApplied, cmd)
		}
	}
	g.checkpoint()
	if used := g.r.Usage(vol); used != 8*40*block.Size {
		t.Fatalf("usage %d", used)
	}
	trim := g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, ToChunk: 256}))
	rewrite := g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 5)))
	if g.r.StartReap(100) != nil {
		t.Fatal("a marker is reaped that no checkpoint holds")
	}
	versions := func() {
		t.Helper()
		for c := range block.Chunk(256) {
			want := trim.Version
			if c == 0 {
				want = rewrite.Version
			}
			if v, ok := g.r.ChunkVersion(vol, c); !ok || v != want {
				t.Fatalf("chunk %d has version %v, want %v", c, v, want)
			}
		}
	}
	versions()
	l := g.r.Lookup(index.Query{Volume: vol, Generation: block.GenerationLatest, Chunk: 3, Count: 1024})
	if l.Pending() || len(l.Runs()) != 1 || l.Runs()[0].State != block.Zero {
		t.Errorf("a trimmed chunk asks the store: %v, %+v", l.Pending(), l.Runs())
	}
	l.Release()
	g.checkpoint()
	steps := 0
	for g.r.Pending().Markers > 0 {
		g.do(g.r.StartReap(50))
		versions()
		if steps++; steps > 100 {
			t.Fatal("the marker stays")
		}
	}
	if steps < 4 {
		t.Errorf("reaped in %d steps: not paced", steps)
	}
	g.checkpoint()
	g.flush()
	if n := g.db.LiveTotal(); n != 1 || g.r.Usage(vol) != block.Size {
		t.Errorf("%d blocks live, usage %d", n, g.r.Usage(vol))
	}
	g = newGroup(t, g.store.(*memstore.Store).Crash(0))
	versions()
	if f := g.r.FloorVersion(vol); f != trim.Version || g.r.Pending().Markers != 0 {
		t.Errorf("floor version %v, %d markers", f, g.r.Pending().Markers)
	}
}

// TestMoveOfOlderData: a moved extent is newer in the layers and older in
// truth; it hides nothing (S10).
func TestMoveOfOlderData(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	from := g.at
	old := g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 0)))
	g.checkpoint()
	g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 0)))
	job := g.r.StartCheckpoint()
	job.Run()
	move := seglog.Move{Record: seglog.Record{Key: key, Volume: vol, Written: old.Version, CRCs: []uint32{1}}, From: from, To: seglog.Location{Segment: 9}}
	g.db.ApplyMoves([]seglog.Move{move})
	if g.db.LiveBlocks(9) == 0 {
		t.Error("a deferred move's target may be written over")
	}
	if err := job.Finish(); err != nil {
		t.Fatal(err)
	}
	if g.db.LiveBlocks(9) != 0 {
		t.Error("a move of what the merge found dead took effect")
	}
	if g.db.LiveBlocks(from.Segment) != 2 {
		t.Errorf("%d blocks held: the old one is in the last durable checkpoint", g.db.LiveBlocks(from.Segment))
	}
	g.flush()
	if g.db.LiveBlocks(from.Segment) != 1 {
		t.Errorf("%d blocks held after a flush", g.db.LiveBlocks(from.Segment))
	}
	if got := g.writtenAt(0, 0); got != firstIndex+3 {
		t.Errorf("block 0 is of entry %d", got)
	}
}

// TestMoveHiddenByAMarker: the move came before the older generation was given
// up; when the reaper forgets marker and originals, the moved copy goes too.
func TestMoveHiddenByAMarker(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	from := g.at
	old := g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 0)))
	newer := g.next(write(1, 0, 0, 0))
	newer.Generation = 1
	g.want(wire.OutcomeApplied, newer)
	trim := g.next(wire.Command{Type: wire.CmdMark, ToChunk: 1, Generation: 1})
	g.want(wire.OutcomeApplied, trim)
	g.checkpoint()
	g.db.ApplyMoves([]seglog.Move{{Record: seglog.Record{Key: key, Volume: vol, Written: old.Version, CRCs: []uint32{1}}, From: from, To: seglog.Location{Segment: 9}}})
	if g.db.LiveBlocks(9) != 1 {
		t.Fatal("the older generation's block did not move")
	}
	at, term := g.r.Applied()
	g.r.SetRetained(at+1, term, vol, 1, nil)
	g.do(g.r.StartReap(100))
	if got := g.writtenAt(0, 0); g.r.Pending().Markers != 0 || got != 0 {
		t.Errorf("with %d markers block 0 is of entry %d", g.r.Pending().Markers, got)
	}
	g.flush()
	if n := g.db.LiveTotal(); n != 0 || g.db.LiveBlocks(9) != 0 {
		t.Errorf("%d blocks live", n)
	}
}

// TestTrimmedDeltaIsNotStored: what a marker hides before its first checkpoint
// never reaches the store.
func TestTrimmedDeltaIsNotStored(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	for b := range block.Index(64) {
		g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, b)))
	}
	g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, ToChunk: 1}))
	g.checkpoint()
	if n := g.db.LiveTotal(); n != 0 || g.r.Usage(vol) != 0 {
		t.Errorf("%d blocks live, usage %d", n, g.r.Usage(vol))
	}
}

// TestMovedTwice: a part of what was moved and not merged is moved once more;
// each block is where it was moved to last.
func TestMovedTwice(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	from := g.at
	cmd := g.next(write(1, 0, 0, 0))
	cmd.Count, cmd.PayloadBytes, cmd.CRCs = 4, 4*block.Size, []uint32{1, 2, 3, 4}
	record := seglog.Record{Key: key, Volume: vol, Written: g.want(wire.OutcomeApplied, cmd).Version, CRCs: cmd.CRCs}
	g.checkpoint()
	second := record
	second.Block, second.CRCs = 1, cmd.CRCs[1:3]
	g.db.ApplyMoves([]seglog.Move{
		{Record: record, From: from, To: seglog.Location{Segment: 8}},
		{Record: second, From: seglog.Location{Segment: from.Segment, Block: from.Block + 1}, To: seglog.Location{Segment: 9}},
	})
	for _, merged := range []bool{false, true} {
		if merged {
			g.checkpoint()
		}
		runs := g.look(index.Query{Volume: vol, Generation: block.GenerationLatest, Count: 4})
		want := []seglog.Location{{Segment: 8}, {Segment: 9}, {Segment: 8, Block: 3}}
		if len(runs) != 3 || runs[0].Place.At != want[0] || runs[1].Place.At != want[1] || runs[2].Place.At != want[2] || runs[2].CRCs[0] != 4 {
			t.Fatalf("merged %v: %+v", merged, runs)
		}
	}
	if n := g.db.LiveTotal(); n != 4 {
		t.Errorf("%d blocks live", n)
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	other, err := g.db.Create(seglog.ReplicaKey{Group: 4, Replica: 1}, index.Creation{Index: firstIndex, Term: firstTerm})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.db.Create(key, index.Creation{}); !errors.Is(err, block.Exists) {
		t.Errorf("created twice: %v", err)
	}
	g.do(other.StartCheckpoint())
	g.want(wire.OutcomeApplied, fence(1, 1))
	g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 0)))
	g.checkpoint()
	g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 1)))
	g.flush()
	g.do(g.db.StartRemove(g.r))
	if g.db.LiveTotal() != 0 || g.db.LiveBlocks(1) == 0 {
		t.Errorf("%d live, %d held", g.db.LiveTotal(), g.db.LiveBlocks(1))
	}
	g.flush()
	if n := g.db.LiveBlocks(1); n != 0 {
		t.Errorf("%d blocks held after a flush", n)
	}
	db, err := index.Open(g.store.(*memstore.Store).Crash(0), index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if all := db.Replicas(); len(all) != 1 || all[0].Key() != other.Key() {
		t.Errorf("%d replicas", len(all))
	}
}

// TestRecycledSegments: live bits of an earlier use of a segment are void (S9).
func TestRecycledSegments(t *testing.T) {
	t.Parallel()
	store := memstore.New()
	generation := uint64(5)
	opts := index.Options{SegmentGeneration: func(seglog.SegmentID) uint64 { return generation }}
	g := newGroup(t, store)
	var err error
	if g.db, err = index.Open(store, opts); err != nil {
		t.Fatal(err)
	}
	if g.r, err = g.db.Create(key, index.Creation{Index: firstIndex, Term: firstTerm}); err != nil {
		t.Fatal(err)
	}
	g.want(wire.OutcomeApplied, fence(1, 1))
	g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 0)))
	g.checkpoint()
	for _, test := range []struct {
		generation uint64
		live       int
	}{{5, 1}, {6, 0}} {
		generation = test.generation
		db, err := index.Open(store, opts)
		if err != nil {
			t.Fatal(err)
		}
		if n := db.LiveBlocks(1); n != test.live {
			t.Errorf("%d live blocks in use %d", n, test.generation)
		}
	}
}

// TestDamagedStore: no bytes of the store make Open or Load panic.
func TestDamagedStore(t *testing.T) {
	t.Parallel()
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 0)))
	g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, Chunk: 4, ToChunk: 5}))
	g.checkpoint()
	g.flush()
	type pair struct{ key, value []byte }
	var all []pair
	snap := g.store.Snapshot()
	it, err := snap.Iterate(nil, []byte{0xff})
	if err != nil {
		t.Fatal(err)
	}
	for ok := it.Seek(nil); ok; ok = it.Next() {
		all = append(all, pair{append([]byte{}, it.Key()...), append([]byte{}, it.Value()...)})
	}
	if len(all) < 9 {
		t.Fatalf("%d records", len(all))
	}
	for _, p := range all {
		for _, damage := range []func(b index.Batch){
			func(b index.Batch) { b.Set(p.key, nil) },
			func(b index.Batch) { b.Set(p.key, p.value[:len(p.value)/2]) },
			func(b index.Batch) { b.Set(p.key, append(p.value[:len(p.value):len(p.value)], 0xff)) },
			func(b index.Batch) { b.Set(append(p.key[:len(p.key):len(p.key)], 0), p.value) },
			func(b index.Batch) { b.Set(p.key[:len(p.key)-1], p.value) },
			func(b index.Batch) { b.Delete(p.key) },
		} {
			store := g.store.(*memstore.Store).Crash(0)
			b := store.NewBatch()
			damage(b)
			if err := store.Commit(b); err != nil {
				t.Fatal(err)
			}
			db, err := index.Open(store, index.Options{})
			if err != nil {
				continue
			}
			if r := db.Replica(key); r != nil {
				l := r.Lookup(index.Query{Volume: vol, Generation: block.GenerationLatest, Count: 4})
				if l.Pending() {
					l.Load()
				}
				r.Digest()
			}
		}
	}
}

// TestColdChunks: what the format holds for the tier survives writes and
// trims: a record that names objects is not forgotten (T2), and a write over
// part of a frame leaves the rest readable.
func TestColdChunks(t *testing.T) {
	t.Parallel()
	store := memstore.New()
	g := newGroup(t, store)
	g.want(wire.OutcomeApplied, fence(1, 1))
	written := g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 900))).Version
	g.checkpoint()
	if err := g.r.PutCold(vol, 0, 4, written, written+100); err != nil {
		t.Fatal(err)
	}
	g.flush()
	g = newGroup(t, store.Crash(0))
	g.op = 1
	g.want(wire.OutcomeApplied, g.next(write(1, 0, 0, 5)))
	for range 2 {
		runs := g.look(index.Query{Volume: vol, Generation: block.GenerationLatest, Block: 4, Count: 4})
		if len(runs) != 3 || runs[0].Count != 1 || runs[1].Place.Kind != index.KindLocal || runs[2].Count != 2 || runs[2].CRCs[1] != 4 {
			t.Fatalf("%+v", runs)
		}
		if p := runs[2].Place; p.Kind != index.KindCold || !p.Framed || p.Skip != 4 || p.Object != 1 || p.Offset != 77 || p.Stored != 9000 || p.Key != 3 {
			t.Fatalf("%+v", p)
		}
		if g.r.Pending().Entries > 0 {
			g.checkpoint()
		}
	}
	version, changed, objects, err := g.r.ChunkRecord(vol, 0)
	if err != nil || version <= written || changed != written+100 || objects != 1 {
		t.Fatalf("version %v, changed %v, %d objects, %v", version, changed, objects, err)
	}
	g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, ToChunk: 1}))
	g.checkpoint()
	g.do(g.r.StartReap(1000))
	if _, _, objects, err := g.r.ChunkRecord(vol, 0); err != nil || objects != 1 || g.r.Pending().Markers != 1 {
		t.Fatalf("a name was forgotten: %d objects, %d markers, %v", objects, g.r.Pending().Markers, err)
	}
}
