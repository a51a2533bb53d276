"""Strict configurations, one class for each kind of YAML file and each group of keys in it."""

from ..extras import require_packages

require_packages("a configuration")

from .data import DataConfig as DataConfig
from .data import FolderConfig as FolderConfig
from .data import IndexConfig as IndexConfig
from .data import MixConfig as MixConfig
from .data import ParquetConfig as ParquetConfig
from .data import PicturesConfig as PicturesConfig
from .data import PreparedConfig as PreparedConfig
from .data import ShardsConfig as ShardsConfig
from .filtering import FilterConfig as FilterConfig
from .measure import BENCHES as BENCHES
from .measure import AblationRowConfig as AblationRowConfig
from .measure import BenchConfig as BenchConfig
from .measure import BenchDataConfig as BenchDataConfig
from .measure import BenchDecodeConfig as BenchDecodeConfig
from .measure import BenchDrawConfig as BenchDrawConfig
from .measure import BenchGpuConfig as BenchGpuConfig
from .measure import BenchInferConfig as BenchInferConfig
from .measure import BenchLoadConfig as BenchLoadConfig
from .measure import BenchModelConfig as BenchModelConfig
from .measure import BenchScaleConfig as BenchScaleConfig
from .measure import BenchServeConfig as BenchServeConfig
from .measure import BenchStatesConfig as BenchStatesConfig
from .measure import BenchTrainConfig as BenchTrainConfig
from .measure import EvaluateConfig as EvaluateConfig
from .measure import LanguagesConfig as LanguagesConfig
from .measure import ModeConfig as ModeConfig
from .measure import PluginFilesConfig as PluginFilesConfig
from .measure import PromptsConfig as PromptsConfig
from .measure import RouteConfig as RouteConfig
from .measure import RoutesConfig as RoutesConfig
from .measure import read_evaluation as read_evaluation
from .reading import read_config as read_config
from .recipe import FreshEncoderConfig as FreshEncoderConfig
from .recipe import RecipeConfig as RecipeConfig
from .recipe import StartConfig as StartConfig
from .run import EvaluationConfig as EvaluationConfig
from .run import InitConfig as InitConfig
from .run import OptimizerConfig as OptimizerConfig
from .run import PrepareConfig as PrepareConfig
from .run import RunConfig as RunConfig
from .run import VocabularyConfig as VocabularyConfig
from .ship import ShipConfig as ShipConfig
from .ship import ShippedModelConfig as ShippedModelConfig
