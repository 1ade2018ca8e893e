package memstore_test

import (
	"testing"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/index/storetest"
)

func TestStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, storetest.Kind{
		New: func(testing.TB) index.Store { return memstore.New() },
		Crash: func(_ testing.TB, s index.Store, choice func(int) int) index.Store {
			m := s.(*memstore.Store)
			return m.Crash(choice(m.Unflushed()))
		},
	})
}
