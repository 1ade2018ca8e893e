package meta

import (
	"context"
	"slices"
	"time"

	"firn.io/firn/internal/loop"
)

// mirrorRetry is the pause between attempts to list a prefix.
const mirrorRetry = 500 * time.Millisecond

// Mirror is a copy of all keys below a prefix that follows the store. It lags
// by any time; nothing may be decided on it that a transaction does not check.
//
// Changed is called on the loop for each key whose content differs from what
// was told before: with a KV that does not exist (but has its Key) when the key
// is gone. After a resync only real differences are told, in order of keys.
// Synced, if set, is called after every complete list and after every batch of changes.
//
// All methods are called on the loop.
type Mirror struct {
	loop    loop.Loop
	store   Store
	prefix  string
	changed func(KV)
	synced  func()

	ctx     context.Context // bounds the lists; from Start
	stop    func()
	keys    map[string]KV
	listing bool
	again   bool // a resync came while listing
	ready   bool
	held    []Change // noticed while listing
}

// NewMirror makes a mirror of prefix; Start begins it.
func NewMirror(l loop.Loop, s Store, prefix string, changed func(KV), synced func()) *Mirror {
	return &Mirror{loop: l, store: s, prefix: prefix, changed: changed, synced: synced, keys: map[string]KV{}}
}

// Start begins to follow. ctx bounds the mirror's lists; it ends by Stop.
func (m *Mirror) Start(ctx context.Context) {
	m.ctx = ctx
	m.stop = m.store.Watch(m.loop, m.prefix, m.notice)
}

// Stop ends the mirror: changed and synced are not called again.
func (m *Mirror) Stop() {
	if m.stop != nil {
		m.stop()
	}
	m.stop, m.ctx = nil, nil
}

// Ready tells whether the prefix was listed once.
func (m *Mirror) Ready() bool { return m.ready }

// Get returns what the mirror knows of the key.
func (m *Mirror) Get(key string) KV {
	if kv, ok := m.keys[key]; ok {
		return kv
	}
	return KV{Key: key}
}

// Keys returns the keys in order.
func (m *Mirror) Keys() []string {
	out := make([]string, 0, len(m.keys))
	for k := range m.keys {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Relist lists the prefix again, as after a resync: when a transaction has
// shown that the mirror is behind, or as a safety net.
func (m *Mirror) Relist() { m.notice(Notice{Resync: true}) }

func (m *Mirror) notice(n Notice) {
	if m.stopped() {
		return
	}
	if n.Resync {
		m.list()
	}
	if m.listing {
		m.held = append(m.held, n.Changes...)
		return
	}
	if len(n.Changes) > 0 {
		m.take(n.Changes)
		m.tellSynced()
	}
}

func (m *Mirror) stopped() bool { return m.ctx == nil }

func (m *Mirror) list() {
	if m.listing {
		m.again = true
		return
	}
	m.listing, m.again = true, false
	m.held = nil
	ctx := m.ctx
	var kvs []KV
	var at Revision
	var err error
	m.loop.Do(loop.Meta, func() { kvs, at, err = m.store.List(ctx, m.prefix) }, func() {
		m.listing = false
		switch {
		case m.stopped():
		case err != nil:
			m.listing = true
			m.loop.After(mirrorRetry, func() {
				m.listing = false
				if !m.stopped() {
					m.list()
				}
			})
		case m.again:
			m.list()
		default:
			m.replace(kvs, at)
		}
	})
}

// replace makes the list the truth, even where it is older: the store may have
// been restored from a backup.
func (m *Mirror) replace(kvs []KV, at Revision) {
	old := m.keys
	m.keys = make(map[string]KV, len(kvs))
	for _, kv := range kvs {
		m.keys[kv.Key] = kv
	}
	var gone []string
	for k := range old {
		if _, still := m.keys[k]; !still {
			gone = append(gone, k)
		}
	}
	slices.Sort(gone)
	for _, k := range gone {
		m.tell(KV{Key: k})
	}
	for _, kv := range kvs {
		if was, had := old[kv.Key]; !had || was.Modified != kv.Modified || was.Created != kv.Created || string(was.Value) != string(kv.Value) {
			m.tell(kv)
		}
	}
	m.ready = true
	held := m.held
	m.held = nil
	held = slices.DeleteFunc(held, func(c Change) bool { return c.KV.Modified <= at })
	m.take(held)
	m.tellSynced()
}

func (m *Mirror) take(changes []Change) {
	for _, c := range changes {
		was, had := m.keys[c.KV.Key]
		if had && c.KV.Modified <= was.Modified {
			continue
		}
		if !c.Deleted {
			m.keys[c.KV.Key] = c.KV
			m.tell(c.KV)
		} else if had {
			delete(m.keys, c.KV.Key)
			m.tell(KV{Key: c.KV.Key})
		}
	}
}

func (m *Mirror) tell(kv KV) {
	if !m.stopped() {
		m.changed(kv)
	}
}

func (m *Mirror) tellSynced() {
	if m.synced != nil && !m.stopped() {
		m.synced()
	}
}
