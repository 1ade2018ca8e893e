package meta

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// Mem is a metadata server in memory, for tests and for the simulator: what an
// etcd cluster is to processes. Each process connects with a MemClient of its
// own, which can be cut off. Its time is the clock that it was given; leases end
// when a call or a Tick finds their time over.
//
// Everything that happens in it depends on its calls and its clock only, so it
// replays in the simulator. It may be used from many goroutines.
type Mem struct {
	clock clock.Clock

	mu        sync.Mutex
	rev       Revision
	keys      map[string]KV
	leases    map[LeaseID]*memLease
	lastLease LeaseID
	watches   []*memWatch
	down      bool
}

type memLease struct {
	ttl time.Duration
	end clock.Instant
}

type memWatch struct {
	client  *MemClient
	loop    loop.Loop
	prefix  string
	fn      func(Notice)
	stopped bool // used on the loop
}

// NewMem returns an empty server at revision 1.
func NewMem(c clock.Clock) *Mem {
	return &Mem{clock: c, rev: 1, keys: map[string]KV{}, leases: map[LeaseID]*memLease{}}
}

// Drive ticks the server from a loop of its own, until that loop ends, so that
// watchers hear of ended leases in time. It is called on the loop.
func (m *Mem) Drive(l loop.Loop) {
	m.Tick()
	l.After(100*time.Millisecond, func() { m.Drive(l) })
}

// Tick ends the leases whose time is over.
func (m *Mem) Tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.expire()
}

// SetDown makes the server unavailable to everybody, or available again. While
// it is down no lease ends, and each has its whole time afterwards: so does etcd
// without a leader.
func (m *Mem) SetDown(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down == down {
		return
	}
	m.expire()
	m.down = down
	if !down {
		m.renewAll()
		m.resync(func(*memWatch) bool { return true })
	}
}

// MemBackup is what Backup copied.
type MemBackup struct {
	rev    Revision
	keys   map[string]KV
	leases map[LeaseID]time.Duration
}

// Backup copies the state of the server.
func (m *Mem) Backup() MemBackup {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.expire()
	b := MemBackup{rev: m.rev, keys: maps.Clone(m.keys), leases: map[LeaseID]time.Duration{}}
	for id, l := range m.leases {
		b.leases[id] = l.ttl
	}
	return b
}

// Restore sets the server back to a backup, its revision too. Leases have their
// whole time again. The ids of those that were granted since are not given out
// anew, as etcd's are not, which have a time in them: their holders still try to
// keep them alive.
func (m *Mem) Restore(b MemBackup) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rev, m.keys = b.rev, maps.Clone(b.keys)
	m.leases = map[LeaseID]*memLease{}
	for id, ttl := range b.leases {
		m.leases[id] = &memLease{ttl: ttl}
	}
	m.renewAll()
	m.resync(func(*memWatch) bool { return true })
}

func (m *Mem) renewAll() {
	now := m.clock.Now()
	for _, l := range m.leases {
		l.end = now.Add(l.ttl)
	}
}

// expire ends leases in the order of their ends.
func (m *Mem) expire() {
	if m.down {
		return
	}
	now := m.clock.Now()
	var over []LeaseID
	for id, l := range m.leases {
		if l.end <= now {
			over = append(over, id)
		}
	}
	slices.SortFunc(over, func(a, b LeaseID) int {
		return cmp.Or(cmp.Compare(m.leases[a].end, m.leases[b].end), cmp.Compare(a, b))
	})
	for _, id := range over {
		m.endLease(id)
	}
}

func (m *Mem) endLease(id LeaseID) {
	delete(m.leases, id)
	var gone []string
	for k, kv := range m.keys {
		if kv.Lease == id {
			gone = append(gone, k)
		}
	}
	if len(gone) == 0 {
		return
	}
	slices.Sort(gone)
	m.rev++
	var changes []Change
	for _, k := range gone {
		delete(m.keys, k)
		changes = append(changes, Change{KV: KV{Key: k, Modified: m.rev}, Deleted: true})
	}
	m.tell(changes)
}

func (m *Mem) tell(changes []Change) {
	for _, w := range m.watches {
		if w.client.cut {
			continue
		}
		var part []Change
		for _, c := range changes {
			if strings.HasPrefix(c.KV.Key, w.prefix) {
				part = append(part, c)
			}
		}
		if len(part) > 0 {
			w.post(Notice{Changes: part})
		}
	}
}

func (m *Mem) resync(which func(*memWatch) bool) {
	for _, w := range m.watches {
		if which(w) && !w.client.cut && !m.down {
			w.post(Notice{Resync: true})
		}
	}
}

func (w *memWatch) post(n Notice) {
	w.loop.Post(func() {
		if !w.stopped {
			w.fn(n)
		}
	})
}

// Call names a method of the store, for injected faults.
type Call uint8

// The calls.
const (
	CallGet Call = iota
	CallList
	CallTxn
	CallGrant
	CallKeepAlive
	CallRevoke
)

// Fault is what happens to one call.
type Fault uint8

const (
	// NoFault lets the call go on.
	NoFault Fault = iota
	// Refuse fails it with Unavailable before it does anything.
	Refuse
	// LoseAnswer does it, and fails it with Unavailable.
	LoseAnswer
)

// MemClient is one process's connection to a Mem.
type MemClient struct {
	mem    *Mem
	cut    bool
	inject func(Call) Fault
}

var _ Store = (*MemClient)(nil)

// Client connects a process.
func (m *Mem) Client() *MemClient { return &MemClient{mem: m} }

// SetCut cuts the process off from the server, which goes on without it, or
// connects it again.
func (c *MemClient) SetCut(cut bool) {
	c.mem.mu.Lock()
	defer c.mem.mu.Unlock()
	was := c.cut
	c.cut = cut
	if was && !cut {
		c.mem.resync(func(w *memWatch) bool { return w.client == c })
	}
}

// Inject makes f decide on the fate of each call; nil for none. f is called with
// the server locked.
func (c *MemClient) Inject(f func(Call) Fault) {
	c.mem.mu.Lock()
	defer c.mem.mu.Unlock()
	c.inject = f
}

// do runs fn on the server, locked, unless the call fails before.
func (c *MemClient) do(ctx context.Context, call Call, what string, fn func(m *Mem) error) error {
	if err := ctx.Err(); err != nil {
		return ctxError(err, what)
	}
	m := c.mem
	m.mu.Lock()
	defer m.mu.Unlock()
	away := block.Errorf(block.Unavailable, "%s: the metadata store does not answer", what)
	if m.down || c.cut {
		return away
	}
	fault := NoFault
	if c.inject != nil {
		fault = c.inject(call)
	}
	if fault == Refuse {
		return away
	}
	m.expire()
	if err := fn(m); err != nil {
		return err
	}
	if fault == LoseAnswer {
		return away
	}
	return nil
}

func ctxError(err error, what string) error {
	if errors.Is(err, context.Canceled) {
		return block.Wrap(block.Canceled, err, "%s", what)
	}
	return block.Wrap(block.Unavailable, err, "%s: the metadata store does not answer", what)
}

func (m *Mem) get(key string) KV {
	if kv, ok := m.keys[key]; ok {
		return kv
	}
	return KV{Key: key}
}

// Get implements Store.
func (c *MemClient) Get(ctx context.Context, key string) (kv KV, err error) {
	err = c.do(ctx, CallGet, "read "+key, func(m *Mem) error { kv = m.get(key); return nil })
	return kv, err
}

// List implements Store.
func (c *MemClient) List(ctx context.Context, prefix string) (kvs []KV, at Revision, err error) {
	if prefix == "" {
		return nil, 0, errNoPrefix
	}
	err = c.do(ctx, CallList, "list "+prefix, func(m *Mem) error {
		at = m.rev
		for k, kv := range m.keys {
			if strings.HasPrefix(k, prefix) {
				kvs = append(kvs, kv)
			}
		}
		slices.SortFunc(kvs, func(a, b KV) int { return cmp.Compare(a.Key, b.Key) })
		return nil
	})
	return kvs, at, err
}

// Txn implements Store.
func (c *MemClient) Txn(ctx context.Context, t Txn) (r TxnResult, err error) {
	if err := t.check(); err != nil {
		return TxnResult{}, err
	}
	err = c.do(ctx, CallTxn, "change the metadata", func(m *Mem) error {
		r.Succeeded = true
		for _, cond := range t.If {
			r.Succeeded = r.Succeeded && m.holds(cond)
		}
		ops := t.Then
		if !r.Succeeded {
			ops = t.Else
		}
		return m.run(ops, &r)
	})
	if err != nil {
		return TxnResult{}, err
	}
	return r, nil
}

func (m *Mem) holds(c Cond) bool {
	kv := m.get(c.key)
	switch c.kind {
	case condCreated:
		return kv.Created == c.revision
	case condModified:
		return kv.Modified == c.revision
	case condValue:
		return kv.Exists() && string(kv.Value) == string(c.value)
	case condPresent:
		return kv.Exists()
	}
	return false
}

func (m *Mem) run(ops []Op, r *TxnResult) error {
	for _, op := range ops {
		if _, ok := m.leases[op.lease]; op.lease != 0 && !ok {
			return block.Errorf(block.NotFound, "put %s: lease %d has ended", op.key, op.lease)
		}
	}
	next := m.rev + 1
	var changes []Change
	for _, op := range ops {
		old := m.get(op.key)
		switch op.kind {
		case opPut:
			kv := KV{Key: op.key, Value: op.value, Created: old.Created, Modified: next, Lease: op.lease}
			if !old.Exists() {
				kv.Created = next
			}
			m.keys[op.key] = kv
			changes = append(changes, Change{KV: kv})
		case opDelete:
			if old.Exists() {
				delete(m.keys, op.key)
				changes = append(changes, Change{KV: KV{Key: op.key, Modified: next}, Deleted: true})
			}
		case opRead:
			r.Read = append(r.Read, old)
		}
	}
	if len(changes) > 0 {
		m.rev = next
		m.tell(changes)
	}
	r.Revision = m.rev
	return nil
}

// Grant implements Store.
func (c *MemClient) Grant(ctx context.Context, ttl time.Duration) (id LeaseID, err error) {
	err = c.do(ctx, CallGrant, "grant a lease", func(m *Mem) error {
		m.lastLease++
		id = m.lastLease
		ttl = (ttl + time.Second - 1).Truncate(time.Second)
		m.leases[id] = &memLease{ttl: ttl, end: m.clock.Now().Add(ttl)}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return id, nil
}

// KeepAlive implements Store.
func (c *MemClient) KeepAlive(ctx context.Context, id LeaseID) error {
	return c.do(ctx, CallKeepAlive, "keep a lease alive", func(m *Mem) error {
		l, ok := m.leases[id]
		if !ok {
			return block.Errorf(block.NotFound, "lease %d has ended", id)
		}
		l.end = m.clock.Now().Add(l.ttl)
		return nil
	})
}

// Revoke implements Store.
func (c *MemClient) Revoke(ctx context.Context, id LeaseID) error {
	return c.do(ctx, CallRevoke, "revoke a lease", func(m *Mem) error {
		if _, ok := m.leases[id]; ok {
			m.endLease(id)
		}
		return nil
	})
}

// Watch implements Store.
func (c *MemClient) Watch(l loop.Loop, prefix string, fn func(Notice)) (stop func()) {
	m := c.mem
	w := &memWatch{client: c, loop: l, prefix: prefix, fn: fn}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watches = append(m.watches, w)
	if !c.cut && !m.down {
		w.post(Notice{Resync: true})
	}
	return func() {
		w.stopped = true
		m.forget(func(o *memWatch) bool { return o == w })
	}
}

func (m *Mem) forget(which func(*memWatch) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watches = slices.DeleteFunc(m.watches, which)
}

// Close implements Store: it ends the client's watches. A process that is killed
// in the simulator closes nothing; its loop drops what it is still told.
func (c *MemClient) Close() error {
	c.mem.forget(func(w *memWatch) bool { return w.client == c })
	return nil
}
