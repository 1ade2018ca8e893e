package raftgroup

import (
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// held is an entry in memory.
type held struct {
	entry   *pb.Entry
	payload *payload.Buf // nil if there is none, or if it was left on disk at open
}

func (e *held) id() EntryID { return EntryID{Index: e.entry.GetIndex(), Term: e.entry.GetTerm()} }

// complete tells whether the payload, if the entry has one, is here.
func (e *held) complete() bool { return e.payload != nil || payloadBytes(e.entry) == 0 }

func (e *held) bytes() int64 { return entryOverhead + int64(payloadBytes(e.entry)) }

func (e *held) release() {
	if e.payload != nil {
		e.payload.Release()
		e.payload = nil
	}
}

// tail is the contiguous end of a log that is in memory: entries first,
// first+1, ... It may be empty; then the next entry sets first.
type tail struct {
	first uint64
	ents  []held
}

func (t *tail) last() uint64 { return t.first + uint64(len(t.ents)) - 1 }

func (t *tail) at(i uint64) *held {
	if i < t.first || i-t.first >= uint64(len(t.ents)) {
		return nil
	}
	return &t.ents[i-t.first]
}

// push appends the entry after the last one.
func (t *tail) push(e held) {
	if len(t.ents) == 0 {
		t.first = e.entry.GetIndex()
	}
	t.ents = append(t.ents, e)
}

// cut drops entry i and all after it.
func (t *tail) cut(i uint64) {
	if i < t.first {
		i = t.first
	}
	for n := len(t.ents); n > 0 && t.last() >= i; n = len(t.ents) {
		t.ents[n-1].release()
		t.ents[n-1] = held{}
		t.ents = t.ents[:n-1]
	}
}

// shift drops the first entry.
func (t *tail) shift() {
	t.ents[0].release()
	t.ents[0] = held{}
	t.ents = t.ents[1:]
	t.first++
}

// retention is the order in which durable entries leave memory: the oldest of
// all groups first.
type retention struct {
	queue []retained
	head  int
	bytes int64
}

type retained struct {
	group *Group
	id    EntryID
	bytes int64
}

func (r *retention) push(g *Group, e *held) {
	n := e.bytes()
	r.bytes += n
	r.queue = append(r.queue, retained{g, e.id(), n})
}

func (r *retention) pop() retained {
	e := r.queue[r.head]
	r.queue[r.head] = retained{}
	r.head++
	r.bytes -= e.bytes
	if r.head > 1024 && r.head*2 > len(r.queue) {
		r.queue = append(r.queue[:0], r.queue[r.head:]...)
		r.head = 0
	}
	return e
}

// evict brings what is retained back under its limit. An entry that is not
// durable or not applied keeps its place in memory and goes to the back.
func (h *Host) evict() {
	for tries := len(h.retained.queue) - h.retained.head; tries > 0 && h.retained.bytes > h.limits.RetainedBytes; tries-- {
		r := h.retained.pop()
		g := r.group
		e := g.tail.at(r.id.Index)
		if e == nil || e.entry.GetTerm() != r.id.Term || g.closed || g.failed != nil {
			continue // overwritten, or gone with its group
		}
		if r.id.Index > g.stable || r.id.Index > g.applied.Index {
			h.retained.push(g, e)
			continue
		}
		for len(g.tail.ents) > 0 && g.tail.first <= r.id.Index {
			g.tail.shift()
		}
	}
}

// storage is Raft's view of a replica's log: the tail in memory, and behind it
// the windows that were read for followers. It never blocks: what is neither
// is asked for, and Raft is told to try again later by the pair ErrCompacted
// and ErrSnapshotTemporarilyUnavailable, which leaves a follower's progress as
// it is.
type storage struct{ g *Group }

// InitialState implements raft.Storage.
func (s storage) InitialState() (*pb.HardState, *pb.ConfState, error) {
	hs := s.g.hard
	return &pb.HardState{Term: &hs.Term, Vote: &hs.Vote, Commit: &hs.Commit}, s.g.conf.state(), nil
}

// Entries implements raft.Storage.
func (s storage) Entries(lo, hi, maxSize uint64) ([]*pb.Entry, error) {
	g := s.g
	if lo < g.cfg.Log.FirstIndex() {
		return nil, raft.ErrCompacted
	}
	if len(g.tail.ents) > 0 && lo >= g.tail.first {
		return collect(g.tail.ents[lo-g.tail.first:], hi, maxSize), nil
	}
	if w := g.windowAt(lo); w != nil {
		return collect(w.ents[lo-w.first:], hi, maxSize), nil
	}
	g.load(lo)
	g.loadsFor = lo
	return nil, raft.ErrCompacted
}

func collect(ents []held, hi, maxSize uint64) []*pb.Entry {
	var out []*pb.Entry
	var size uint64
	for i := range ents {
		e := ents[i].entry
		if e.GetIndex() >= hi {
			break
		}
		// What the library counts: the encoded size, of which Data is nearly all.
		size += uint64(len(e.GetData())) + entryEncodingOverhead
		if size > maxSize && len(out) > 0 {
			break
		}
		out = append(out, e)
	}
	return out
}

// entryEncodingOverhead is an upper bound of an entry's encoding besides Data.
const entryEncodingOverhead = 32

// Term implements raft.Storage.
func (s storage) Term(i uint64) (uint64, error) {
	if t, ok := s.g.term(i); ok {
		return t, nil
	}
	if i+1 < s.g.cfg.Log.FirstIndex() {
		return 0, raft.ErrCompacted
	}
	return 0, raft.ErrUnavailable
}

func (g *Group) term(i uint64) (uint64, bool) {
	if e := g.tail.at(i); e != nil {
		return e.entry.GetTerm(), true
	}
	return g.cfg.Log.Term(i)
}

// LastIndex implements raft.Storage.
func (s storage) LastIndex() (uint64, error) { return s.g.lastIndex(), nil }

func (g *Group) lastIndex() uint64 {
	if len(g.tail.ents) > 0 {
		return g.tail.last()
	}
	return g.cfg.Log.LastIndex()
}

// FirstIndex implements raft.Storage.
func (s storage) FirstIndex() (uint64, error) { return s.g.cfg.Log.FirstIndex(), nil }

// window is a part of the log that was read back, with payloads.
type window struct {
	group *Group
	first uint64
	ents  []held
	bytes int64
}

func (g *Group) windowAt(i uint64) *window {
	for _, w := range g.windows {
		if i >= w.first && i-w.first < uint64(len(w.ents)) {
			return w
		}
	}
	return nil
}

// windowsPerGroup is one per follower of the usual group.
const windowsPerGroup = 2

// load reads entries from lo on, with payloads, off the loop. One read per
// group is in flight.
func (g *Group) load(lo uint64) {
	if g.loading || g.closed || g.failed != nil {
		return
	}
	g.loading = true
	h := g.host
	h.counters.WindowReads++
	hi := g.stable + 1
	if len(g.tail.ents) > 0 && lo < g.tail.first {
		hi = min(hi, g.tail.first)
	}
	if lo >= hi {
		g.loading = false
		return // not durable yet; asked for again when it is
	}
	log := g.cfg.Log
	var ents []LogEntry
	var err error
	g.cfg.Loop.Do(loop.DiskRead, func() { ents, err = log.Read(lo, hi, h.limits.WindowBytes, true) }, func() {
		g.loading = false
		g.loaded(ents, err)
	})
}

func (g *Group) loaded(ents []LogEntry, err error) {
	h := g.host
	if err != nil {
		h.counters.ReadErrors++
		if g.readError == nil || g.readError.Error() != err.Error() {
			h.cfg.Logf("group %d: the log cannot be read back for a follower: %v", g.cfg.Group, err)
		}
		g.readError = err
		if block.KindOf(err) == block.Corrupt {
			// Another member has what this one cannot give (L4).
			g.SendLeaderAway()
		}
	}
	if err != nil || g.closed || g.failed != nil || len(ents) == 0 {
		for _, e := range ents {
			if e.Payload != nil {
				e.Payload.Release()
			}
		}
		return
	}
	g.readError = nil
	w := &window{group: g, first: ents[0].Index}
	good := true
	for i, le := range ents {
		t, known := g.term(le.Index)
		e := heldOf(le)
		good = good && known && t == le.Term && le.Index == w.first+uint64(i) && payloadLen(le.Payload) == payloadBytes(e.entry)
		if !good {
			// The log was truncated, or overwritten, while it was read.
			if le.Payload != nil {
				le.Payload.Release()
			}
			continue
		}
		w.bytes += e.bytes()
		w.ents = append(w.ents, e)
	}
	if len(w.ents) == 0 {
		return
	}
	for len(g.windows) >= windowsPerGroup {
		h.dropWindow(g.windows[0])
	}
	for len(h.windows) > 0 && h.windowed+w.bytes > h.limits.WindowsBytes {
		h.dropWindow(h.windows[0])
	}
	g.windows = append(g.windows, w)
	h.windows = append(h.windows, w)
	h.windowed += w.bytes
	g.resume()
}

func (h *Host) dropWindow(w *window) {
	for i := range w.ents {
		w.ents[i].release()
	}
	h.windowed -= w.bytes
	h.windows = without(h.windows, w)
	w.group.windows = without(w.group.windows, w)
}

func without(ws []*window, w *window) []*window {
	for i := range ws {
		if ws[i] == w {
			return append(ws[:i:i], ws[i+1:]...)
		}
	}
	return ws
}

// cutWindows forgets what was read of entry i and after.
func (g *Group) cutWindows(i uint64) {
	for _, w := range append([]*window(nil), g.windows...) {
		if w.first+uint64(len(w.ents)) > i {
			g.host.dropWindow(w)
		}
	}
}
