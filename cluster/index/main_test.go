package index_test

import (
	"flag"
	"os"
	"testing"
)

// TestMain sets how far the random histories go, unless the command line does.
func TestMain(m *testing.M) {
	steps, checks := "100", "150"
	if os.Getenv("FIRN_TEST_LONG") != "" {
		steps, checks = "250", "1000"
	}
	for name, value := range map[string]string{"rapid.steps": steps, "rapid.checks": checks, "rapid.nofailfile": "true"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}
