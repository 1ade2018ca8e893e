package meta

import (
	"context"
	"crypto/tls"
	"errors"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// EtcdConfig says how to reach an etcd cluster.
type EtcdConfig struct {
	// Endpoints are host:port or URLs.
	Endpoints []string
	// TLS, if not nil, is used for all endpoints.
	TLS *tls.Config
	// Username and Password are for an etcd with authentication.
	Username, Password string
}

// Bounds of the calls to etcd. A call whose context ends earlier ends with it.
const (
	etcdCallTime      = 3 * time.Second
	etcdKeepAliveTime = time.Second
	etcdDialTime      = 2 * time.Second
	// etcdPingEvery is what stock etcd allows a client at most.
	etcdPingEvery   = 5 * time.Second
	etcdPingTimeout = 2 * time.Second
	etcdPage        = 1000
	watchRetry      = 300 * time.Millisecond
	// watchCheck is how often a watch compares the store's revision with what it
	// has seen: one that lies below means that the store was restored.
	watchCheck = 10 * time.Second
)

// Etcd is the Store of a real cluster.
type Etcd struct {
	client *clientv3.Client
	names  string // the endpoints, for error texts

	ctx     context.Context // of the watches; ends by Close
	cancel  context.CancelFunc
	watches sync.WaitGroup
}

var _ Store = (*Etcd)(nil)

// OpenEtcd connects and waits, as long as ctx allows, until the store answers.
func OpenEtcd(ctx context.Context, cfg EtcdConfig) (*Etcd, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, TLS: cfg.TLS, Username: cfg.Username, Password: cfg.Password,
		DialTimeout: etcdDialTime, DialKeepAliveTime: etcdPingEvery, DialKeepAliveTimeout: etcdPingTimeout,
		Logger: zap.NewNop(),
	})
	names := strings.Join(cfg.Endpoints, ", ")
	if err != nil {
		return nil, block.Wrap(block.Invalid, err, "connect to etcd at %s", names)
	}
	e := WrapEtcd(client, names)
	for {
		_, err = e.Get(ctx, ClusterKey)
		if err == nil {
			return e, nil
		}
		if k := block.KindOf(err); k != block.Unavailable || ctx.Err() != nil {
			e.cancel()
			return nil, errors.Join(err, client.Close())
		}
		select {
		case <-time.After(watchRetry):
		case <-ctx.Done():
		}
	}
}

// WrapEtcd returns the Store over a client that is connected already, as that of
// an etcd in this process is. names is for error texts. Close closes the client.
func WrapEtcd(client *clientv3.Client, names string) *Etcd {
	e := &Etcd{client: client, names: names}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

// fail gives an error of the client its kind. outer is the caller's context.
func (e *Etcd) fail(outer context.Context, err error, what string) error {
	switch {
	case errors.Is(outer.Err(), context.Canceled):
		return block.Wrap(block.Canceled, err, "%s", what)
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return block.Wrap(block.NotFound, err, "%s", what)
	case errors.Is(err, rpctypes.ErrNoSpace):
		return block.Wrap(block.NoSpace, err, "%s: etcd's quota is used up; compact and defragment it, then `etcdctl alarm disarm`", what)
	case errors.Is(err, rpctypes.ErrTooManyOps), errors.Is(err, rpctypes.ErrRequestTooLarge), errors.Is(err, rpctypes.ErrDuplicateKey):
		return block.Wrap(block.Invalid, err, "%s", what)
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrUserEmpty):
		return block.Wrap(block.Denied, err, "%s: etcd at %s", what, e.names)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return block.Errorf(block.Unavailable, "%s: etcd at %s does not answer in time; start it, or look at the network to it: what is attached goes on, the rest waits for it", what, e.names)
	}
	return block.Wrap(block.Unavailable, err, "%s: etcd at %s does not answer", what, e.names)
}

// Get implements Store.
func (e *Etcd) Get(ctx context.Context, key string) (KV, error) {
	c, cancel := context.WithTimeout(ctx, etcdCallTime)
	defer cancel()
	r, err := e.client.Get(c, key)
	if err != nil {
		return KV{}, e.fail(ctx, err, "read "+key)
	}
	return fromRange(key, r), nil
}

func fromRange(key string, r *clientv3.GetResponse) KV {
	if len(r.Kvs) == 0 {
		return KV{Key: key}
	}
	return fromEtcd(r.Kvs[0].Key, r.Kvs[0].Value, r.Kvs[0].CreateRevision, r.Kvs[0].ModRevision, r.Kvs[0].Lease)
}

func fromEtcd(key, value []byte, created, modified, lease int64) KV {
	return KV{Key: string(key), Value: value, Created: Revision(created), Modified: Revision(modified), Lease: LeaseID(lease)}
}

// List implements Store, in pages of one revision. If that is compacted away
// meanwhile, it begins again.
func (e *Etcd) List(ctx context.Context, prefix string) ([]KV, Revision, error) {
	if prefix == "" {
		return nil, 0, errNoPrefix
	}
	for {
		kvs, at, err := e.listOnce(ctx, prefix)
		if err == nil {
			return kvs, at, nil
		}
		if !errors.Is(err, rpctypes.ErrCompacted) {
			return nil, 0, e.fail(ctx, err, "list "+prefix)
		}
	}
}

func (e *Etcd) listOnce(ctx context.Context, prefix string) (kvs []KV, at Revision, err error) {
	end := clientv3.WithRange(clientv3.GetPrefixRangeEnd(prefix))
	from := prefix
	for {
		c, cancel := context.WithTimeout(ctx, etcdCallTime)
		r, err := e.client.Get(c, from, end, clientv3.WithLimit(etcdPage), clientv3.WithRev(int64(at)))
		cancel()
		if err != nil {
			return nil, 0, err
		}
		if at == 0 {
			at = Revision(r.Header.Revision)
		}
		for _, kv := range r.Kvs {
			kvs = append(kvs, fromEtcd(kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Lease))
		}
		if !r.More || len(r.Kvs) == 0 {
			return kvs, at, nil
		}
		from = kvs[len(kvs)-1].Key + "\x00"
	}
}

// Txn implements Store.
func (e *Etcd) Txn(ctx context.Context, t Txn) (TxnResult, error) {
	if err := t.check(); err != nil {
		return TxnResult{}, err
	}
	c, cancel := context.WithTimeout(ctx, etcdCallTime)
	defer cancel()
	r, err := e.client.Txn(c).If(etcdConds(t.If)...).Then(etcdOps(t.Then)...).Else(etcdOps(t.Else)...).Commit()
	if err != nil {
		return TxnResult{}, e.fail(ctx, err, "change the metadata")
	}
	out := TxnResult{Succeeded: r.Succeeded, Revision: Revision(r.Header.Revision)}
	ops := t.Then
	if !r.Succeeded {
		ops = t.Else
	}
	for i, op := range ops {
		if op.kind == opRead {
			out.Read = append(out.Read, fromRange(op.key, (*clientv3.GetResponse)(r.Responses[i].GetResponseRange())))
		}
	}
	return out, nil
}

func etcdConds(conds []Cond) []clientv3.Cmp {
	out := make([]clientv3.Cmp, len(conds))
	for i, c := range conds {
		switch c.kind {
		case condCreated:
			out[i] = clientv3.Compare(clientv3.CreateRevision(c.key), "=", int64(c.revision))
		case condModified:
			out[i] = clientv3.Compare(clientv3.ModRevision(c.key), "=", int64(c.revision))
		case condValue:
			out[i] = clientv3.Compare(clientv3.Value(c.key), "=", string(c.value))
		case condPresent:
			out[i] = clientv3.Compare(clientv3.CreateRevision(c.key), ">", 0)
		}
	}
	return out
}

func etcdOps(ops []Op) []clientv3.Op {
	out := make([]clientv3.Op, len(ops))
	for i, op := range ops {
		switch op.kind {
		case opPut:
			out[i] = clientv3.OpPut(op.key, string(op.value), clientv3.WithLease(clientv3.LeaseID(op.lease)))
		case opDelete:
			out[i] = clientv3.OpDelete(op.key)
		case opRead:
			out[i] = clientv3.OpGet(op.key)
		}
	}
	return out
}

// Grant implements Store.
func (e *Etcd) Grant(ctx context.Context, ttl time.Duration) (LeaseID, error) {
	c, cancel := context.WithTimeout(ctx, etcdCallTime)
	defer cancel()
	r, err := e.client.Grant(c, int64((ttl+time.Second-1)/time.Second))
	if err != nil {
		return 0, e.fail(ctx, err, "grant a lease")
	}
	return LeaseID(r.ID), nil
}

// KeepAlive implements Store.
func (e *Etcd) KeepAlive(ctx context.Context, id LeaseID) error {
	c, cancel := context.WithTimeout(ctx, etcdKeepAliveTime)
	defer cancel()
	if _, err := e.client.KeepAliveOnce(c, clientv3.LeaseID(id)); err != nil {
		return e.fail(ctx, err, "keep a lease alive")
	}
	return nil
}

// Revoke implements Store. It is not waited for long: the lease ends anyway.
func (e *Etcd) Revoke(ctx context.Context, id LeaseID) error {
	c, cancel := context.WithTimeout(ctx, etcdKeepAliveTime)
	defer cancel()
	if _, err := e.client.Revoke(c, clientv3.LeaseID(id)); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return e.fail(ctx, err, "revoke a lease")
	}
	return nil
}

// Usage is how full an etcd member is.
type Usage struct {
	// Bytes is the size of its database, QuotaBytes what it may grow to; beyond
	// it, the whole etcd cluster refuses writes. 0: the member does not say (older
	// than 3.6); stock etcd has 2 GiB then.
	Bytes, QuotaBytes int64
	// Alarms are what the member complains of.
	Alarms []string
}

// AlarmFraction is the part of the quota at which operators are to be told.
const AlarmFraction = 0.6

// Alarm tells whether operators are to be told.
func (u Usage) Alarm() bool {
	quota := u.QuotaBytes
	if quota <= 0 {
		quota = 2 << 30
	}
	return len(u.Alarms) > 0 || float64(u.Bytes) >= AlarmFraction*float64(quota)
}

// Usage asks the members for their sizes and returns the fullest. It is for
// metrics and for `firn health`, every minute or so.
func (e *Etcd) Usage(ctx context.Context) (Usage, error) {
	var worst Usage
	var failed error
	answered := false
	endpoints := e.client.Endpoints()
	if len(endpoints) == 0 {
		endpoints = []string{""} // the one in this process
	}
	for _, ep := range endpoints {
		c, cancel := context.WithTimeout(ctx, etcdCallTime)
		r, err := e.client.Status(c, ep)
		cancel()
		if err != nil {
			failed = e.fail(ctx, err, "ask "+ep+" for its state")
			continue
		}
		answered = true
		if r.DbSize >= worst.Bytes {
			worst.Bytes, worst.QuotaBytes = r.DbSize, r.DbSizeQuota
		}
		worst.Alarms = append(worst.Alarms, r.Errors...)
	}
	if !answered {
		return Usage{}, failed
	}
	return worst, nil
}

// Watch implements Store. One goroutine per watch reads etcd's stream and hands
// each notice to the loop; the next one is read when the loop has taken it.
func (e *Etcd) Watch(l loop.Loop, prefix string, fn func(Notice)) (stop func()) {
	ctx, cancel := context.WithCancel(e.ctx)
	stopped := false // used on the loop
	deliver := func(n Notice) {
		taken := make(chan struct{})
		l.Post(func() {
			if !stopped {
				fn(n)
			}
			close(taken)
		})
		select {
		case <-taken:
		case <-ctx.Done():
		}
	}
	e.watches.Add(1)
	go func() {
		defer e.watches.Done()
		for ctx.Err() == nil {
			e.follow(ctx, prefix, deliver)
			select {
			case <-time.After(watchRetry):
			case <-ctx.Done():
			}
		}
	}()
	return func() {
		stopped = true
		cancel()
	}
}

// follow runs one stream until it breaks in a way that may have missed changes.
// (The client itself resumes a broken connection at the revision it had reached.)
func (e *Etcd) follow(ctx context.Context, prefix string, deliver func(Notice)) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	check := time.NewTicker(watchCheck)
	defer check.Stop()
	stream := e.client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	var seen int64
	for {
		select {
		case r, ok := <-stream:
			if !ok || r.Err() != nil {
				return
			}
			seen = max(seen, r.Header.Revision)
			if r.Created {
				deliver(Notice{Resync: true})
			}
			if len(r.Events) > 0 {
				deliver(Notice{Changes: fromEvents(r.Events)})
			}
		case <-check.C:
			if e.behind(ctx, seen) {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// behind tells whether the store's revision is below one that was seen.
func (e *Etcd) behind(ctx context.Context, seen int64) bool {
	c, cancel := context.WithTimeout(ctx, etcdCallTime)
	defer cancel()
	r, err := e.client.Get(c, ClusterKey, clientv3.WithCountOnly())
	return err == nil && r.Header.Revision < seen
}

func fromEvents(events []*clientv3.Event) []Change {
	out := make([]Change, len(events))
	for i, ev := range events {
		out[i] = Change{
			KV:      fromEtcd(ev.Kv.Key, ev.Kv.Value, ev.Kv.CreateRevision, ev.Kv.ModRevision, ev.Kv.Lease),
			Deleted: !ev.IsCreate() && !ev.IsModify(),
		}
	}
	return out
}

// Close implements Store.
func (e *Etcd) Close() error {
	e.cancel()
	e.watches.Wait()
	// The client of an etcd in this process reports its own end as an error.
	if err := e.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return block.Wrap(block.Unavailable, err, "disconnect from etcd at %s", e.names)
	}
	return nil
}
