package index_test

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

const firstIndex, firstTerm = 10, 5

// segmentBlocks is small, so that segments are soon full and used again.
const segmentBlocks = 48

// entry is one entry of the log of a group.
type entry struct {
	cmd *wire.Command
	// retained stands for a command: the list of retained generations.
	retained *retained
}

type retained struct {
	volume block.VolumeID
	from   block.Generation
	list   []block.Generation
}

// content is what a block of the disk holds.
type content struct {
	key    seglog.ReplicaKey
	volume block.VolumeID
	at     int64 // block of the volume
	seen   seenBlock
}

// machine is a disk with two replicas of one group over one index, and the
// model beside it. Both replicas are given the same log; checkpoints, reaping,
// moves and use of segments are each replica's own.
type machine struct {
	t     *rapid.T
	store *memstore.Store
	db    *index.DB
	disk  map[seglog.Location]content
	next  seglog.Location
	last  seglog.SegmentID
	keys  [2]seglog.ReplicaKey

	log    []entry
	places [2][]seglog.Location // of the entries' payloads, by replica
	model  *model
	steps  [2]*step
	flush  *step
	reads  []*pendingRead
	// versions seen since the last crash.
	versions map[string]block.Version
	// away: the second replica has had the first caught entries only, and comes
	// back by a copy.
	away        bool
	caught      int
	copying     *copying
	copies      int
	generations bool // generations rise and are retained
	shrunk      bool // retention shrank, by a list or a deletion: live bits may be more than needed
}

// step is a job between its parts.
type step struct {
	job *index.Job
	ran bool
}

type pendingRead struct {
	lookup *index.Lookup
	q      index.Query
	want   []*seenBlock
	key    seglog.ReplicaKey
}

func newMachine(t *rapid.T, generations bool) *machine {
	m := &machine{t: t, store: memstore.New(), disk: map[seglog.Location]content{}, model: newModel(firstIndex),
		generations: generations, versions: map[string]block.Version{}}
	m.keys = [2]seglog.ReplicaKey{{Group: 1, Replica: 1}, {Group: 1, Replica: 2}}
	m.newSegment()
	m.open()
	return m
}

func (m *machine) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) open() {
	var err error
	m.db, err = index.Open(m.store, index.Options{})
	m.check(err)
	for i, key := range m.keys {
		r := m.db.Replica(key)
		if r == nil {
			r, err = m.db.Create(key, index.Creation{Index: firstIndex, Term: firstTerm, Conf: []byte("conf")})
			m.check(err)
		}
		for {
			at, _ := r.Applied()
			if _, mixed := r.Installing(); mixed || int(at-firstIndex) >= m.delivered(i) {
				break
			}
			m.applyTo(i, int(at-firstIndex))
		}
	}
}

func (m *machine) applyTo(i, at int) wire.Outcome {
	e := &m.log[at]
	r := m.db.Replica(m.keys[i])
	n := uint64(firstIndex + 1 + at)
	if e.retained != nil {
		r.SetRetained(n, firstTerm, e.retained.volume, e.retained.from, e.retained.list)
		return wire.OutcomeApplied
	}
	res, err := r.Apply(n, firstTerm, e.cmd, m.places[i][at])
	m.check(err)
	if res.Version != block.MakeVersion(0, n) {
		m.t.Fatalf("entry %d answers version %v", n, res.Version)
	}
	return res.Outcome
}

// newSegment takes a free segment: one that the index does not point into and
// whose entries are all in durable checkpoints (L7), else a new one.
func (m *machine) newSegment() {
	used := map[seglog.SegmentID]bool{m.next.Segment: true}
	if m.db != nil {
		for i, key := range m.keys {
			durable := m.db.Replica(key).DurablyApplied()
			for at, l := range m.places[i] {
				used[l.Segment] = used[l.Segment] || uint64(firstIndex+1+at) > durable
			}
		}
	}
	for s := seglog.SegmentID(1); s <= m.last && len(m.reads) == 0 && m.copying == nil; s++ {
		if !used[s] && m.db.LiveBlocks(s) == 0 {
			m.next = seglog.Location{Segment: s}
			return
		}
	}
	m.last++
	m.next = seglog.Location{Segment: m.last}
}

// store puts blocks on the disk.
func (m *machine) put(key seglog.ReplicaKey, id block.VolumeID, at int64, gen block.Generation, written block.Version, crcs []uint32) seglog.Location {
	if int(m.next.Block)+len(crcs) > segmentBlocks {
		m.newSegment()
	}
	l := m.next
	for i, crc := range crcs {
		m.disk[seglog.Location{Segment: l.Segment, Block: l.Block + uint16(i)}] = content{key, id, at + int64(i), seenBlock{gen, written, crc}}
	}
	m.next.Block += uint16(len(crcs))
	return l
}

func (m *machine) propose(e entry) {
	m.log = append(m.log, e)
	n := len(m.log) - 1
	for i := range m.keys {
		m.places[i] = append(m.places[i], seglog.Location{})
		if i == 0 || !m.away {
			m.deliver(i, n)
		}
	}
	want := wire.OutcomeApplied
	if e.cmd != nil {
		want = m.model.apply(e.cmd)
	} else {
		m.model.applied++
	}
	for i := range m.present() {
		if got := m.applyTo(i, n); got != want {
			m.t.Fatalf("entry %d: outcome %d, want %d: %+v", n, got, want, e.cmd)
		}
	}
}

var volumeIDs = []block.VolumeID{{1}, {2}, {3}}

func (m *machine) command() {
	t := m.t
	cmd := &wire.Command{Volume: rapid.SampledFrom(volumeIDs[:2]).Draw(t, "volume")}
	v := m.model.volumes[cmd.Volume]
	if v == nil || rapid.IntRange(0, 11).Draw(t, "fence") == 0 {
		m.fence(cmd, v)
		return
	}
	r := &v.record
	cmd.Epoch, cmd.Nonce, cmd.Generation = r.Epoch, r.Nonce, r.Generation
	if m.generations && rapid.IntRange(0, 9).Draw(t, "snapshot") == 0 {
		cmd.Generation++
	}
	if rapid.IntRange(0, 30).Draw(t, "stale") == 0 {
		cmd.Epoch -= block.Epoch(rapid.IntRange(0, 1).Draw(t, "epoch"))
		cmd.Nonce += block.Nonce(rapid.IntRange(0, 1).Draw(t, "nonce"))
		cmd.Generation -= min(cmd.Generation, block.Generation(rapid.IntRange(0, 1).Draw(t, "generation")))
	}
	cmd.OpSeq = v.floor + block.OpSeq(rapid.SampledFrom([]int{0, 1, 2, 3, 5, 7, 40, 90, 4095, 4096}).Draw(t, "ahead"))
	cmd.Floor = v.floor + block.OpSeq(rapid.IntRange(0, 2).Draw(t, "floor"))
	if rapid.IntRange(0, 20).Draw(t, "late") == 0 {
		cmd.OpSeq -= min(cmd.OpSeq, 3)
	}
	cmd.Chunk = rapid.SampledFrom([]block.Chunk{0, 1, 2, 3, 1023, 1024, 1030}).Draw(t, "chunk")
	cmd.Block = block.Index(rapid.SampledFrom([]int{0, 1, 8, 15, 16, 17, 31, 40, 1008, 1020}).Draw(t, "block"))
	room := block.BlocksPerChunk - int(cmd.Block)
	cmd.Count = uint16(min(room, rapid.SampledFrom([]int{1, 1, 1, 2, 4, 16, 20, 33}).Draw(t, "count")))
	cmd.Type = rapid.SampledFrom([]wire.CommandType{wire.CmdWrite, wire.CmdWrite, wire.CmdWrite, wire.CmdZero, wire.CmdMark}).Draw(t, "type")
	switch cmd.Type {
	case wire.CmdWrite:
		for i := range cmd.Count {
			cmd.CRCs = append(cmd.CRCs, uint32(len(m.log))<<8|uint32(i))
		}
		cmd.PayloadBytes = uint32(cmd.Count) * block.Size
	case wire.CmdMark:
		cmd.Block, cmd.Count = 0, 0
		cmd.ToChunk = cmd.Chunk + block.Chunk(rapid.SampledFrom([]int{1, 2, 2000}).Draw(t, "chunks"))
	}
	m.propose(entry{cmd: cmd})
}

func (m *machine) fence(cmd *wire.Command, v *modelVolume) {
	t := m.t
	cmd.Type = wire.CmdFence
	cmd.Epoch = block.Epoch(rapid.IntRange(1, 4).Draw(t, "epoch"))
	cmd.Nonce = block.Nonce(rapid.IntRange(1, 2).Draw(t, "nonce"))
	cmd.Size = block.Offset(rapid.SampledFrom([]block.Chunk{1023, 2100, 2100, 2100}).Draw(t, "size"), 0)
	cmd.Settings = block.SettingsCounter(rapid.IntRange(1, 3).Draw(t, "settings"))
	cmd.VolumeValue = fmt.Appendf(nil, "value %d", len(m.log))
	if v != nil {
		cmd.Epoch += v.record.Epoch - min(v.record.Epoch, 2)
	}
	if rapid.IntRange(0, 9).Draw(t, "other") == 0 {
		cmd.Type = rapid.SampledFrom([]wire.CommandType{wire.CmdResize, wire.CmdDelete}).Draw(t, "type")
		if cmd.Type == wire.CmdDelete && rapid.IntRange(0, 2).Draw(t, "sure") != 0 {
			cmd.Volume = volumeIDs[2]
		}
		m.shrunk = m.shrunk || m.generations && cmd.Type == wire.CmdDelete
	}
	m.propose(entry{cmd: cmd})
}

func (m *machine) retain() {
	id := rapid.SampledFrom(volumeIDs[:2]).Draw(m.t, "volume")
	v := m.model.volumes[id]
	if !m.generations || v == nil || v.record.Generation == 0 {
		return
	}
	e := &retained{volume: id, from: v.record.Generation}
	// A snapshot that was deleted does not come back.
	for _, g := range m.views(id) {
		if g != block.GenerationLatest && rapid.Bool().Draw(m.t, "keep") {
			e.list = append(e.list, g)
		}
	}
	m.shrunk = true
	m.propose(entry{retained: e})
}

// views are the generations that a volume can be read at.
func (m *machine) views(id block.VolumeID) []block.Generation {
	views := []block.Generation{block.GenerationLatest}
	v := m.model.volumes[id]
	if v == nil {
		return views
	}
	kept := map[block.Generation]bool{}
	for i := range v.record.Generation {
		kept[i] = true
	}
	for _, e := range m.log {
		if e.retained != nil && e.retained.volume == id {
			for g := range e.retained.from {
				kept[g] = kept[g] && slices.Contains(e.retained.list, g)
			}
		}
	}
	for g := range v.record.Generation {
		if kept[g] {
			views = append(views, g)
		}
	}
	return views
}

func (m *machine) expect(q index.Query) []*seenBlock {
	var want []*seenBlock
	for b := range int64(q.Count) {
		want = append(want, m.model.seen(q.Volume, int64(q.Chunk)*block.BlocksPerChunk+int64(q.Block)+b, q.Generation))
	}
	return want
}

func (m *machine) compare(p *pendingRead) {
	at := 0
	for _, run := range p.lookup.Runs() {
		if int(run.Block) != int(p.q.Block)+at || run.Count == 0 {
			m.t.Fatalf("%+v: run %+v at block %d", p.q, run, at)
		}
		for i := range int(run.Count) {
			want := p.want[at]
			at++
			if run.State != block.Data {
				if want != nil {
					m.t.Fatalf("%+v: block %d reads as zeros, want %v", p.q, at-1, want)
				}
				continue
			}
			got := seenBlock{run.Generation, run.Written, run.CRCs[i]}
			if want == nil || got != *want {
				m.t.Fatalf("%+v: block %d is of %v, want %v", p.q, at-1, &got, want)
			}
			l := seglog.Location{Segment: run.Place.At.Segment, Block: run.Place.At.Block + uint16(i)}
			holds := content{p.key, p.q.Volume, int64(p.q.Chunk)*block.BlocksPerChunk + int64(p.q.Block) + int64(at-1), got}
			if m.disk[l] != holds {
				m.t.Fatalf("%+v: block %d is said to be at %v, which holds %+v, want %+v", p.q, at-1, l, m.disk[l], holds)
			}
			if !m.db.Live(l.Segment, l.Block) && p.lookup.Applied() == m.db.Replica(p.key).AppliedVersion() {
				m.t.Fatalf("%+v: block %d is at %v, which is not live", p.q, at-1, l)
			}
		}
	}
	if at != int(p.q.Count) {
		m.t.Fatalf("%+v: runs cover %d blocks", p.q, at)
	}
}

func (m *machine) read() {
	t := m.t
	p := &pendingRead{key: rapid.SampledFrom(m.present()).Draw(t, "replica")}
	p.q.Volume = rapid.SampledFrom(volumeIDs[:2]).Draw(t, "volume")
	p.q.Generation = rapid.SampledFrom(m.views(p.q.Volume)).Draw(t, "view")
	p.q.Chunk = rapid.SampledFrom([]block.Chunk{0, 1, 2, 3, 4, 1023, 1024, 1030}).Draw(t, "chunk")
	p.q.Block = block.Index(rapid.IntRange(0, 50).Draw(t, "block"))
	p.q.Count = uint16(rapid.IntRange(1, 40).Draw(t, "count"))
	m.lookUp(p)
	if p.lookup.Pending() && rapid.Bool().Draw(t, "later") {
		m.reads = append(m.reads, p)
		return
	}
	m.finishRead(p)
}

func (m *machine) lookUp(p *pendingRead) {
	p.lookup = m.db.Replica(p.key).Lookup(p.q)
	p.want = m.expect(p.q)
	if p.lookup.Applied() != block.MakeVersion(0, m.model.applied) {
		m.t.Fatalf("look-up at %v, applied %d", p.lookup.Applied(), m.model.applied)
	}
}

func (m *machine) finishRead(p *pendingRead) {
	if p.lookup.Pending() {
		m.check(p.lookup.Load())
	}
	m.compare(p)
	p.lookup.Release()
}

func (m *machine) finishReads() {
	for _, p := range m.reads {
		m.finishRead(p)
	}
	m.reads = nil
}

func (m *machine) start(i int, reap bool) {
	if m.steps[i] != nil || i == 1 && m.copying != nil && m.copying.job != nil {
		return
	}
	r := m.db.Replica(m.keys[i])
	var job *index.Job
	if reap {
		job = r.StartReap(rapid.IntRange(1, 20).Draw(m.t, "extents"))
	} else {
		job = r.StartCheckpoint()
	}
	if job != nil {
		m.steps[i] = &step{job: job}
	}
}

func (m *machine) advance(i int) {
	s := m.steps[i]
	switch {
	case s == nil:
	case !s.ran:
		s.job.Run()
		s.ran = true
	default:
		m.check(s.job.Finish())
		m.steps[i] = nil
	}
}

func (m *machine) settle() {
	for i := range m.steps {
		for m.steps[i] != nil {
			m.advance(i)
		}
	}
}

// collect moves what is live out of a segment, now and then only a part of it.
func (m *machine) collect() {
	if len(m.reads) > 0 {
		return
	}
	s := seglog.SegmentID(rapid.IntRange(1, int(m.last)).Draw(m.t, "segment"))
	if s == m.next.Segment || m.claimed(s) {
		return
	}
	var moves []seglog.Move
	left := uint16(rapid.SampledFrom([]int{0, 0, 3}).Draw(m.t, "left")) // every so manieth block stays
	for b := uint16(0); b < segmentBlocks; {
		from := seglog.Location{Segment: s, Block: b}
		c, ok := m.disk[from]
		b++
		if !ok || !m.db.Live(s, b-1) || left > 0 && b%left == 0 {
			continue
		}
		crcs := []uint32{c.seen.crc}
		for ; b < segmentBlocks && m.db.Live(s, b) && (left == 0 || b%left != left-1); b++ {
			d := m.disk[seglog.Location{Segment: s, Block: b}]
			if d.key != c.key || d.volume != c.volume || d.seen.written != c.seen.written || d.at != c.at+int64(len(crcs)) ||
				d.at/block.BlocksPerChunk != c.at/block.BlocksPerChunk {
				break
			}
			crcs = append(crcs, d.seen.crc)
		}
		to := m.put(c.key, c.volume, c.at, c.seen.gen, c.seen.written, crcs)
		moves = append(moves, seglog.Move{
			Record: seglog.Record{Key: c.key, Volume: c.volume, Chunk: block.Chunk(c.at / block.BlocksPerChunk),
				Block: block.Index(c.at % block.BlocksPerChunk), Generation: c.seen.gen, Written: c.seen.written, CRCs: crcs},
			From: from, To: to,
		})
	}
	m.db.ApplyMoves(moves)
}

// claimed tells whether the log holds entries in the segment.
func (m *machine) claimed(s seglog.SegmentID) bool {
	for i, key := range m.keys {
		durable := m.db.Replica(key).DurablyApplied()
		for at, l := range m.places[i] {
			if l.Segment == s && uint64(firstIndex+1+at) > durable {
				return true
			}
		}
	}
	return false
}

func (m *machine) crash() {
	durable := [2]uint64{}
	for i, key := range m.keys {
		durable[i] = m.db.Replica(key).DurablyApplied()
		m.steps[i] = nil
	}
	m.reads, m.flush, m.copying = nil, nil, nil
	m.store = m.store.Crash(rapid.IntRange(0, m.store.Unflushed()).Draw(m.t, "kept"))
	m.versions = map[string]block.Version{}
	// The log does not reach below what was durable.
	db, err := index.Open(m.store, index.Options{})
	m.check(err)
	for i, key := range m.keys {
		if durable[i] == 0 {
			continue
		}
		r := db.Replica(key)
		if r == nil {
			m.t.Fatalf("replica %v with %d durable is gone", key, durable[i])
		}
		if at, _ := r.Applied(); at < durable[i] || r.DurablyApplied() != at {
			m.t.Fatalf("replica %v is at %d, had %d durable", key, at, durable[i])
		}
	}
	m.check(db.Close())
	m.open()
}

func (m *machine) invariants() {
	m.check(m.db.CheckLive(!m.shrunk && m.copying == nil))
	for _, key := range m.present() {
		r := m.db.Replica(key)
		for _, id := range volumeIDs[:2] {
			v := m.model.volumes[id]
			rec, ok := r.Record(id)
			if ok != (v != nil) {
				m.t.Fatalf("volume %v known: %v", id, ok)
			}
			if v == nil || v.record.Tombstone {
				continue
			}
			want := v.record
			want.Volume, want.VolumeValue = id, rec.VolumeValue
			if fmt.Sprint(rec) != fmt.Sprint(want) {
				m.t.Fatalf("record %+v, want %+v", rec, want)
			}
			for _, c := range []block.Chunk{0, 3, 1024, 2000} {
				got, _ := r.ChunkVersion(id, c)
				name := fmt.Sprint(key, id, c)
				if got < m.versions[name] || got < m.model.lastChange(id, c) {
					m.t.Fatalf("chunk %d has version %v, had %v, changed at %v", c, got, m.versions[name], m.model.lastChange(id, c))
				}
				m.versions[name] = got
			}
		}
	}
}

func (m *machine) digests() {
	if m.away {
		return
	}
	a, err := m.db.Replica(m.keys[0]).Digest()
	m.check(err)
	b, err := m.db.Replica(m.keys[1]).Digest()
	m.check(err)
	if a != b {
		m.t.Fatalf("digests %x and %x", a, b)
	}
}

// mapAll walks the map of a volume in small pieces and compares every block.
func (m *machine) mapAll() {
	key := rapid.SampledFrom(m.present()).Draw(m.t, "replica")
	id := rapid.SampledFrom(volumeIDs[:2]).Draw(m.t, "volume")
	q := index.MapQuery{Volume: id, Generation: rapid.SampledFrom(m.views(id)).Draw(m.t, "view"), To: 1100, Max: rapid.IntRange(1, 50).Draw(m.t, "max")}
	data := map[int64]bool{}
	for q.From < q.To {
		p := m.db.Replica(key).Map(q)
		if p.Pending() {
			m.check(p.Load())
		}
		for _, run := range p.Runs() {
			if run.Chunk < q.From || run.Chunk >= p.Covered() {
				m.t.Fatalf("run %+v outside of [%d, %d)", run, q.From, p.Covered())
			}
			for b := range int64(run.Count) {
				if run.State == block.Data {
					data[int64(run.Chunk)*block.BlocksPerChunk+int64(run.Block)+b] = true
				}
			}
		}
		if p.Covered() <= q.From {
			m.t.Fatalf("no progress at %d", q.From)
		}
		q.From = p.Covered()
		p.Release()
	}
	for _, c := range []int64{0, 1, 2, 3, 4, 1023, 1024, 1030} {
		for b := range int64(block.BlocksPerChunk) {
			if b == 80 {
				b = 1000
			}
			if at := c*block.BlocksPerChunk + b; data[at] != (m.model.seen(id, at, q.Generation) != nil) {
				m.t.Fatalf("block %d of chunk %d: data %v", b, c, data[at])
			}
		}
	}
}

// readAll compares everything there is, in all views.
func (m *machine) readAll() {
	for _, key := range m.present() {
		for _, id := range volumeIDs[:2] {
			for _, g := range m.views(id) {
				for _, c := range []block.Chunk{0, 1, 2, 3, 1023, 1024, 1030} {
					p := &pendingRead{key: key, q: index.Query{Volume: id, Generation: g, Chunk: c, Count: 80}}
					m.lookUp(p)
					m.finishRead(p)
				}
			}
		}
	}
}

func history(t *rapid.T, generations bool) {
	m := newMachine(t, generations)
	which := func(t *rapid.T) int { return rapid.IntRange(0, 1).Draw(t, "of") }
	with := func(f func(t *rapid.T)) func(*rapid.T) {
		return func(t *rapid.T) { m.t = t; f(t) }
	}
	commands := with(func(t *rapid.T) {
		for range rapid.IntRange(1, 10).Draw(t, "commands") {
			m.command()
		}
	})
	t.Repeat(map[string]func(*rapid.T){
		"commands": commands, "more commands": commands, "and more": commands,
		"read":        with(func(*rapid.T) { m.read() }),
		"finish":      with(func(*rapid.T) { m.finishReads() }),
		"map":         with(func(*rapid.T) { m.mapAll() }),
		"checkpoint":  with(func(t *rapid.T) { m.start(which(t), false) }),
		"checkpoint2": with(func(t *rapid.T) { i := which(t); m.start(i, false); m.advance(i); m.advance(i) }),
		"reap":        with(func(t *rapid.T) { m.start(which(t), true) }),
		"reap all": with(func(t *rapid.T) {
			i := which(t)
			for range 50 {
				m.start(i, true)
				m.advance(i)
				m.advance(i)
			}
		}),
		"advance":  with(func(t *rapid.T) { m.advance(which(t)) }),
		"advance2": with(func(t *rapid.T) { m.advance(which(t)) }),
		"flush": with(func(*rapid.T) {
			switch f := m.flush; {
			case f == nil:
				m.flush = &step{job: m.db.StartFlush()}
			case !f.ran:
				f.job.Run()
				f.ran = true
			default:
				m.check(f.job.Finish())
				m.flush = nil
			}
		}),
		"flush2": with(func(*rapid.T) {
			if m.flush == nil {
				f := m.db.StartFlush()
				f.Run()
				m.check(f.Finish())
			}
		}),
		"collect": with(func(*rapid.T) { m.collect() }),
		"retain":  with(func(*rapid.T) { m.retain() }),
		"leave":   with(func(*rapid.T) { m.leave() }),
		"copy":    with(func(*rapid.T) { m.copyStep() }),
		"copy2":   with(func(t *rapid.T) { m.copySome(rapid.IntRange(1, 30).Draw(t, "steps")) }),
		"crash":   with(func(*rapid.T) { m.crash() }),
		"digest":  with(func(*rapid.T) { m.digests() }),
		"":        with(func(*rapid.T) { m.invariants() }),
	})
	m.t = t
	m.finishReads()
	m.copyAll()
	m.readAll()
	m.settle()
	m.readAll()
	m.digests()
	m.crash()
	m.invariants()
	m.readAll()
	m.digests()
	m.check(m.db.Close())
}

func TestHistories(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) { history(t, false) })
}

func TestHistoriesWithGenerations(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) { history(t, true) })
}
